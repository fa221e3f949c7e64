"""Routed experts of a layer in two matrix products in all: torch's grouped one over their stacked weights.

For GPUs of compute capability 9.0 and newer, where `torch._grouped_mm` is one kernel. Not run on a GPU; on a CPU the
same call is a loop, with which it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from workers.kernels.quantized import Weight
from workers.kernels.seam import Kernels, MLPPart
from workers.model.experts import Expert, Experts
from workers.parallel.dispatch import ExpertRows

__all__ = ["GroupedExperts"]

_ALIGNED = 8  # bf16 values in 16 bytes, of which rows must be multiples


class _Held:
    """A linear layer that keeps its weight [out, in] as it is."""

    __slots__ = ("weight",)

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(self(x))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class _HeldGated(_Held):
    """`silu(gate) * up` of a weight that holds gate above up."""

    __slots__ = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _gated(F.linear(x, self.weight))


class GroupedExperts(Experts):
    """See `Experts`. What cannot be grouped, quantized weights and odd sizes, runs one expert after the other."""

    __slots__ = ("_stacks",)

    def __init__(self, num_slots: int, kernels: Kernels) -> None:
        super().__init__(num_slots, kernels)
        self._stacks: tuple[torch.Tensor, torch.Tensor] | None = None

    def build(self, gate_up: Weight, down: Weight) -> Expert:
        if not (_can_group(gate_up) and _can_group(down)):
            return super().build(gate_up, down)
        assert isinstance(gate_up, torch.Tensor)
        assert isinstance(down, torch.Tensor)
        return _HeldGated(gate_up), _Held(down)

    def put(self, slot: int, gate_up: Weight, down: Weight) -> None:
        self._stacks = None
        super().put(slot, gate_up, down)

    def rearranged(self, slots: Sequence[int | Expert]) -> Experts:
        new = GroupedExperts(len(slots), self._kernels)
        new._slots = [self._slots[slot] if isinstance(slot, int) else slot for slot in slots]
        return new

    @property
    def stacked(self) -> bool:
        """Whether all slots are filled with what can be grouped; puts their weights side by side then."""
        return self._stacks is not None or self._stack() is not None

    def __call__(self, rows: ExpertRows, part: MLPPart | None = None) -> torch.Tensor:
        assert part is None, "kernels that group experts have no parts of others"
        stacks = self._stacks or self._stack()
        if stacks is None:
            assert rows.ends is None, "experts one after the other want counts on the host"
            return super().__call__(rows)
        ends = rows.ends
        if ends is None:
            ends = torch.tensor(rows.counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(rows.x_RD.device)
        gated = _gated(torch._grouped_mm(rows.x_RD, stacks[0].transpose(1, 2), offs=ends))
        y = torch._grouped_mm(gated, stacks[1].transpose(1, 2), offs=ends)
        if rows.ends is not None:
            # Behind the last end nothing was written: what lies there may be no number.
            y.masked_fill_((torch.arange(len(y), device=y.device) >= ends[-1]).unsqueeze(1), 0.0)
        return y

    def _stack(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Puts the slots' weights side by side, and has the slots look at them there: they are kept once."""
        held = [slot for slot in self._slots if slot is not None]
        if not held or len(held) < len(self._slots):
            return None
        weights: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        for slot in held:
            for layer, found in zip(slot, weights, strict=True):
                if not isinstance(layer, _Held):
                    return None
                found.append(layer.weight)
        self._stacks = torch.stack(weights[0]), torch.stack(weights[1])
        self._slots = [(_HeldGated(a), _Held(b)) for a, b in zip(*self._stacks, strict=True)]
        return self._stacks


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _can_group(weight: Weight) -> bool:
    if not isinstance(weight, torch.Tensor) or weight.dtype != torch.bfloat16:
        return False
    return all(size % _ALIGNED == 0 for size in weight.shape)
