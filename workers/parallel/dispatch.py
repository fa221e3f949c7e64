"""Expert dispatch: one seam between the gate and the experts.

    rows, handle = dispatch(x_TD, routing)     each token's row goes to where its experts live
    y = experts(rows)                          rows grouped by local expert
    out_TD = combine(y, handle)                each token's outputs, weighted and summed at home

A token's outputs are always summed in fp32 in ascending order of expert id, at the rank that owns the token: the sum's
bits do not depend on where the experts live. Shape suffixes: T tokens of this rank, K experts a token, R rows to
compute here, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

__all__ = [
    "Dispatch",
    "ExpertRows",
    "LocalDispatch",
    "LocalHandle",
    "Routing",
    "ShareDispatch",
    "ShareHandle",
    "group_by_expert",
    "weighted_sum",
]


# Elements that are summed at a time on a CPU, so that in fp32 they stay in its cache.
_CACHED = 1 << 18


class Routing(NamedTuple):
    """For T tokens: expert ids [T, K] int64, ascending in each row, and their weights [T, K] fp32."""

    expert_ids: torch.Tensor
    weights: torch.Tensor


class ExpertRows(NamedTuple):
    """Rows [R, D] grouped by local expert, and how many belong to each of them."""

    x_RD: torch.Tensor
    counts: list[int]


HandleT = TypeVar("HandleT")


class Dispatch(Protocol, Generic[HandleT]):
    """The seam; `handle` is opaque, frozen, and good for one `combine`.

    Where ranks of a tensor axis share their tokens, what `combine` gives is this rank's part of the sum over the axis.
    """

    @property
    def kind(self) -> str:
        """What carries the rows, in words for `shoal status`."""
        ...

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[ExpertRows, HandleT]: ...

    def combine(self, y_RD: torch.Tensor, handle: HandleT) -> torch.Tensor: ...


def group_by_expert(slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stable order that sorts `slots` [N], and the number of entries of each slot [num_slots]."""
    order = slots.argsort(stable=True)
    return order, torch.bincount(slots, minlength=num_slots)


def weighted_sum(y_RD: torch.Tensor, order: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """`sum_k weights[t, k] * y[row of (t, k)]` in fp32, left to right over k, in the dtype of `y` [T, D].

    `order[r]` is the flat (t, k) of row r; a choice without a row counts as zeros. A library's reduction may split the
    sum in a way that depends on the shape; this one never does.
    """
    (num_tokens, top_k), width = weights_TK.shape, y_RD.shape[1]
    row_of = order.new_full((num_tokens * top_k,), len(order))
    row_of.scatter_(0, order, torch.arange(len(order), device=order.device))
    if len(order) < num_tokens * top_k:
        y_RD = torch.cat((y_RD, y_RD.new_zeros(1, width)))
    step = max(1, _CACHED // (top_k * width) if y_RD.device.type == "cpu" else num_tokens)
    if num_tokens <= step:
        return _sum_tile(y_RD, row_of, weights_TK).to(y_RD.dtype)
    out = y_RD.new_empty(num_tokens, width)
    for start in range(0, num_tokens, step):
        rows = row_of[start * top_k : (start + step) * top_k]
        out[start : start + step] = _sum_tile(y_RD, rows, weights_TK[start : start + step])
    return out


def _sum_tile(y_RD: torch.Tensor, row_of: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    top_k = weights_TK.shape[1]
    y = y_RD.index_select(0, row_of).float().view(-1, top_k, y_RD.shape[1])
    weights = weights_TK.unsqueeze(-1)
    total = y[:, 0] * weights[:, 0]
    for k in range(1, top_k):
        total.addcmul_(y[:, k], weights[:, k])
    return total


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """`order` [T * K]: which flat (token, choice) each row is."""

    order: torch.Tensor
    weights: torch.Tensor


class LocalDispatch:
    """All experts live on this rank; rows move within its memory only."""

    kind = "local"

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[ExpertRows, LocalHandle]:
        order, counts = group_by_expert(routing.expert_ids.flatten(), self._num_experts)
        rows = x_TD.index_select(0, order // routing.expert_ids.shape[1])
        return ExpertRows(rows, counts.tolist()), LocalHandle(order, routing.weights)

    def combine(self, y_RD: torch.Tensor, handle: LocalHandle) -> torch.Tensor:
        return weighted_sum(y_RD, handle.order, handle.weights)


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

    def __init__(self, num_experts: int, held: tuple[int, ...], device: torch.device) -> None:
        assert len(set(held)) == len(held)
        self._num_slots = len(held)
        slots = torch.full((num_experts,), len(held))  # behind the last slot: another rank's
        slots[list(held)] = torch.arange(len(held))
        self._slots = slots.to(device)

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[ExpertRows, ShareHandle]:
        slots = self._slots[routing.expert_ids.flatten()]
        order, counts = group_by_expert(slots, self._num_slots + 1)
        *ours, _ = counts.tolist()
        order = order[: sum(ours)]
        rows = x_TD.index_select(0, order // routing.expert_ids.shape[1])
        return ExpertRows(rows, ours), ShareHandle(order, routing.weights)

    def combine(self, y_RD: torch.Tensor, handle: ShareHandle) -> torch.Tensor:
        return weighted_sum(y_RD, handle.order, handle.weights)
