"""Routed experts that live on this rank, run grouped: a few matrix products per expert, none per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.kernels.quantized import Weight
from workers.kernels.seam import GatedLinear, Kernels, Linear, MLPPart
from workers.parallel.dispatch import ExpertRows

__all__ = ["Expert", "Experts", "tiles"]

# What a slot holds: gate and up in one, and down.
Expert = tuple[GatedLinear, Linear]

# A matrix library prepares each number of rows once, which takes longer than the product itself. So an expert's rows
# are run in tiles of these sizes.
_SMALL = 8
_STEP = 16
_TILE = 256


class Experts:
    """The slots of one layer; each holds an expert, `down(silu(gate(x)) * up(x))`."""

    __slots__ = ("_kernels", "_slots")

    def __init__(self, num_slots: int, kernels: Kernels) -> None:
        self._kernels = kernels
        self._slots: list[Expert | None] = [None] * num_slots

    def put(self, slot: int, gate_up: Weight, down: Weight) -> None:
        """Fills a slot, or replaces what is in it; `gate_up` [2 * inner, hidden] holds gate above up."""
        self._slots[slot] = self.build(gate_up, down)

    def build(self, gate_up: Weight, down: Weight) -> Expert:
        """An expert that no slot holds yet."""
        return self._kernels.gated_linear(gate_up, None), self._kernels.linear(down, None)

    def rearranged(self, slots: Sequence[int | Expert]) -> Experts:
        """Other slots: each holds what one of these holds, by its number, or an expert built for it."""
        new = Experts(len(slots), self._kernels)
        new._slots = [self._slots[slot] if isinstance(slot, int) else slot for slot in slots]
        return new

    def __call__(self, rows: ExpertRows, part: MLPPart | None = None) -> torch.Tensor:
        """Each row through its own expert, and those behind them through `part`; [R, hidden] in the rows' order.

        Experts without rows are not touched.
        """
        chosen: list[Expert] = []
        counts = []
        for slot, count in enumerate(rows.counts):
            if count:
                expert = self._slots[slot]
                assert expert is not None, f"slot {slot} is empty"
                chosen.append(expert)
                counts.append(count)
        if (chosen or part) and (few := self._kernels.few_rows_experts(chosen, rows.x_RD, counts, part)) is not None:
            return few
        outputs = []
        start = 0
        for (gated, down), count in zip(chosen, counts, strict=True):
            for first, last, skip, size in tiles(start, start + count, len(rows.x_RD)):
                y = down(gated(rows.x_RD[first:last]))
                outputs.append(y if size == last - first else y.narrow(0, skip, size))
            start += count
        if part is not None:
            given = self._kernels.few_rows_experts((), rows.x_RD[start:], (), part)
            assert given is not None
            outputs.append(given)
        return torch.cat(outputs) if outputs else rows.x_RD


def tiles(start: int, stop: int, num_rows: int) -> list[tuple[int, int, int, int]]:
    """Cuts rows `start` to `stop` of `num_rows` into tiles of few different sizes.

    Each is (first, last, skip, size): run rows `first` to `last`, and of the results take `size` after `skip`. The rows
    that pad a tile are its neighbours, so nothing is copied.
    """
    found = []
    while start < stop:
        size = min(_TILE, stop - start)
        padded = size if size <= _SMALL else min(-(-size // _STEP) * _STEP, num_rows)
        first = min(start, num_rows - padded)
        found.append((first, first + padded, start - first, size))
        start += size
    return found
