"""Expert dispatch by DeepEP (deepseek-ai/DeepEP), where it is installed. Not run on a GPU.

It sends a token to each rank once, however many of its experts live there, and adds up what comes back from the ranks.
So a rank adds its own experts' outputs first: the sum's bits depend on where experts live, and
`inference.deterministic` keeps to `AllToAllDispatch`; so do ranks that have closed up after a loss, for a buffer keeps
the ranks that it was made with. See `dispatch.py` for the seam and the shape suffixes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from scheduler.experts import ExpertPlacement
from workers.parallel.all_to_all import AllToAllDispatch
from workers.parallel.dispatch import ExpertRows, Meanwhile, Routing
from workers.parallel.exchange import Exchange
from workers.parallel.moves import group_by_expert, weighted_sum

__all__ = ["DeepEPDispatch", "DeepEPHandle", "open_buffer", "serves"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeepEPHandle:
    """`own`: which of the tokens are this rank's to send. `order` [R]: which flat (arrived token, choice) each row is;
    `weights` [arrived, K]; `theirs` is DeepEP's.
    """

    own: slice
    num_tokens: int
    order: torch.Tensor
    weights: torch.Tensor
    theirs: Any


class DeepEPDispatch(AllToAllDispatch):
    """`buffer` is a `deep_ep.Buffer` over the ranks of `exchange`."""

    def __init__(
        self,
        buffer: Any,
        exchange: Exchange,
        placement: ExpertPlacement,
        *,
        part: tuple[int, int] = (0, 1),
        device: torch.device | None = None,
    ) -> None:
        super().__init__(exchange, placement, part=part, device=device)
        self._buffer = buffer

    def relocated(self, placement: ExpertPlacement) -> AllToAllDispatch:
        return DeepEPDispatch(self._buffer, self._exchange, placement, part=self._part, device=self._device)

    @property
    def kind(self) -> str:
        return "DeepEP"

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, meanwhile: Meanwhile | None = None
    ) -> tuple[ExpertRows, Any]:
        if meanwhile is not None:
            meanwhile()
        index, parts = self._part
        num_tokens = len(x_TD)
        own = slice(num_tokens * index // parts, num_tokens * (index + 1) // parts)
        physical = self._place(routing.expert_ids[own], self._physical)
        per_rank, per_node, per_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(
            physical, self._exchange.size * self._slots
        )
        x, local, weights, _, theirs, _ = self._buffer.dispatch(
            x_TD[own].contiguous(),
            topk_idx=physical,
            topk_weights=routing.weights[own].contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
        )
        # A choice that lives elsewhere is -1 here.
        slots = local.flatten().to(torch.int64)
        order, counts = group_by_expert(torch.where(slots < 0, self._slots, slots), self._slots + 1)
        *ours, _ = counts.tolist()
        order = order[: sum(ours)]
        rows = x.index_select(0, order // max(1, local.shape[1]))
        return ExpertRows(rows, ours[: self._ours]), DeepEPHandle(own, num_tokens, order, weights, theirs)

    def combine(self, y_RD: torch.Tensor, handle: Any) -> torch.Tensor:
        assert isinstance(handle, DeepEPHandle)
        combined, _, _ = self._buffer.combine(weighted_sum(y_RD, handle.order, handle.weights), handle.theirs)
        ours: torch.Tensor = combined
        if len(ours) == handle.num_tokens:
            return ours
        out = ours.new_zeros(handle.num_tokens, ours.shape[-1])
        out[handle.own] = ours
        return out


def serves(size: int) -> bool:
    """Whether DeepEP knows how to run over so many ranks."""
    from deep_ep import Buffer

    try:
        Buffer.get_dispatch_config(size)
        Buffer.get_combine_config(size)
    except AssertionError as error:  # how it refuses
        log.warning("experts are not dispatched by DeepEP: %s", error)
        return False
    return True


def open_buffer(group: Any, size: int, row_bytes: int) -> Any:
    """A `deep_ep.Buffer` over `size` ranks for rows of `row_bytes`, as large as its own configurations ask for."""
    from deep_ep import Buffer

    configurations = (Buffer.get_dispatch_config(size), Buffer.get_combine_config(size))
    within = max(found.get_nvl_buffer_size_hint(row_bytes, size) for found in configurations)
    between = max(found.get_rdma_buffer_size_hint(row_bytes, size) for found in configurations)
    return Buffer(group, within, between)
