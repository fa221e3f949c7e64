"""Dispatch to this rank's own experts with shapes that no routing changes, and without asking the device for a number.

That is what a CUDA graph needs (`workers/graphs.py`), and what saves waiting for the device elsewhere. Every choice has
a row, those for other ranks' experts behind all others; they come back as zeros and weigh nothing. See `dispatch.py`
for the seam and the shape suffixes. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.parallel.dispatch import ExpertRows, LocalDispatch, LocalHandle, Routing

__all__ = ["StaticDispatch"]


class StaticDispatch(LocalDispatch):
    """`held` are the experts of this rank's slots, each in one slot of one rank. Those that are not among them live on
    the other ranks of the tensor axis, which have the same tokens.
    """

    def __init__(self, num_experts: int, held: tuple[int, ...], device: torch.device) -> None:
        super().__init__(num_experts)
        assert len(set(held)) == len(held)
        slots = torch.full((num_experts,), len(held))  # behind the last slot: another rank's
        slots[list(held)] = torch.arange(len(held))
        self._slots = slots.to(device)
        self._numbers = torch.arange(len(held), device=device)

    def takes_shared(self, num_tokens: int) -> bool:
        return False

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, meanwhile: Callable[[], object] | None = None
    ) -> tuple[ExpertRows, LocalHandle]:
        if meanwhile is not None:
            meanwhile()
        slots, order = self._slots[routing.expert_ids.flatten()].sort(stable=True)
        ends = torch.searchsorted(slots, self._numbers, right=True, out_int32=True)
        # A choice for another rank's expert weighs nothing.
        ours = self._slots[routing.expert_ids] < len(self._numbers)
        rows = x_TD.index_select(0, order // routing.expert_ids.shape[1])
        return ExpertRows(rows, [], ends), LocalHandle(order, routing.weights * ours)
