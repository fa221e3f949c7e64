"""Expert dispatch: one seam between the gate and the experts.

    rows, handle = dispatch(x_TD, routing)     each token's row goes to where its experts live
    y = experts(rows)                          rows grouped by local expert
    out_TD = combine(y, handle)                each token's outputs, weighted and summed at home

A token's outputs are always summed in fp32 in ascending order of expert id, at the rank that owns the token: the sum's
bits do not depend on where the experts live. Shape suffixes: T tokens of this rank, K experts a token, R rows to
compute here, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from workers.parallel.moves import RowMoves, TorchMoves

__all__ = [
    "Dispatch",
    "EveryonesRows",
    "ExpertRows",
    "LocalDispatch",
    "LocalHandle",
    "Meanwhile",
    "Neighbourhood",
    "Routing",
    "ShareDispatch",
    "ShareHandle",
]


class Routing(NamedTuple):
    """For T tokens: expert ids [T, K] int64, ascending in each row, and their weights [T, K] fp32."""

    expert_ids: torch.Tensor
    weights: torch.Tensor


class EveryonesRows(NamedTuple):
    """Rows that go through the shared experts' inner values `first` to `last` here, and through the rest elsewhere."""

    rows: int
    first: int
    last: int


class ExpertRows(NamedTuple):
    """Rows [R, D] grouped by local expert, and how many belong to each of them.

    `ends` [experts] int32 says on the device where each one's rows end, and `counts` is empty then
    (`static_dispatch.py`). `every` are rows behind those of the experts.
    """

    x_RD: torch.Tensor
    counts: list[int]
    ends: torch.Tensor | None = None
    every: EveryonesRows | None = None


HandleT = TypeVar("HandleT")
Meanwhile = Callable[[], object]


class Neighbourhood(Protocol):
    """The part of an exchange that other things than experts may use; see `Exchange`."""

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    def counted_rows(
        self, x: torch.Tensor, counts: torch.Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor: ...


class Dispatch(Protocol, Generic[HandleT]):
    """The seam; `handle` is opaque, frozen, and good for one `combine`.

    Where ranks of a tensor axis share their tokens, what `combine` gives is this rank's part of the sum over the axis.
    """

    @property
    def kind(self) -> str:
        """What carries the rows, in words for `shoal status`."""
        ...

    @property
    def neighbours(self) -> Neighbourhood | None:
        """The other ranks, where all share a host's memory and each has tokens of its own."""
        ...

    def takes_shared(self, num_tokens: int) -> bool:
        """Whether what is combined for so many tokens of this rank has the shared experts' outputs in it."""
        ...

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, meanwhile: Meanwhile | None = None
    ) -> tuple[ExpertRows, HandleT]:
        """`meanwhile` is called once, while rows are under way where that takes time."""
        ...

    def combine(self, y_RD: torch.Tensor, handle: HandleT) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """`order` [T * K]: which flat (token, choice) each row is."""

    order: torch.Tensor
    weights: torch.Tensor


class LocalDispatch:
    """All experts live on this rank; rows move within its memory only."""

    kind = "local"
    neighbours = None

    def __init__(self, num_experts: int, moves: RowMoves | None = None) -> None:
        self._num_experts = num_experts
        self._moves = moves or TorchMoves()

    def takes_shared(self, num_tokens: int) -> bool:
        return False

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, meanwhile: Meanwhile | None = None
    ) -> tuple[ExpertRows, LocalHandle]:
        if meanwhile is not None:
            meanwhile()
        order, counts = self._moves.group(routing.expert_ids.flatten(), self._num_experts)
        rows = self._moves.take(x_TD, order, routing.expert_ids.shape[1])
        return ExpertRows(rows, counts.tolist()), LocalHandle(order, routing.weights)

    def combine(self, y_RD: torch.Tensor, handle: LocalHandle) -> torch.Tensor:
        return self._moves.weighted_sum(y_RD, handle.order, handle.weights)


@dataclass(frozen=True, slots=True)
class ShareHandle:
    """`order` [R]: which flat (token, choice) each row is; weights [T, K]."""

    order: torch.Tensor
    weights: torch.Tensor


class ShareDispatch:
    """Every rank of the tensor axis has all tokens and some of the experts; each computes for those it has.

    `held` are the experts of this rank's slots, each expert in one slot of one rank.
    """

    kind = "none (each rank's own experts)"
    neighbours = None

    def __init__(
        self, num_experts: int, held: tuple[int, ...], device: torch.device, moves: RowMoves | None = None
    ) -> None:
        self._moves = moves or TorchMoves()
        assert len(set(held)) == len(held)
        self._num_slots = len(held)
        slots = torch.full((num_experts,), len(held))  # behind the last slot: another rank's
        slots[list(held)] = torch.arange(len(held))
        self._slots = slots.to(device)

    def takes_shared(self, num_tokens: int) -> bool:
        return False

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, meanwhile: Meanwhile | None = None
    ) -> tuple[ExpertRows, ShareHandle]:
        if meanwhile is not None:
            meanwhile()
        slots = self._slots[routing.expert_ids.flatten()]
        order, counts = self._moves.group(slots, self._num_slots + 1)
        *ours, _ = counts.tolist()
        order = order[: sum(ours)]
        rows = self._moves.take(x_TD, order, routing.expert_ids.shape[1])
        return ExpertRows(rows, ours), ShareHandle(order, routing.weights)

    def combine(self, y_RD: torch.Tensor, handle: ShareHandle) -> torch.Tensor:
        return self._moves.weighted_sum(y_RD, handle.order, handle.weights)
