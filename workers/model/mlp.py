"""The gated MLP (Shazeer, "GLU variants improve transformer", arXiv 2002.05202)."""

from __future__ import annotations

import torch

from workers.kernels.seam import GatedLinear, Norm
from workers.model.parallel_linear import ResidualLinear

__all__ = ["GatedMLP"]


class GatedMLP:
    """One layer's MLP block: `x + down(silu(gate(norm(x))) * up(norm(x)))`, for x [T, hidden] in fp32."""

    __slots__ = ("_down", "_gate_up", "_norm")

    def __init__(self, *, norm: Norm, gate_up: GatedLinear, down: ResidualLinear) -> None:
        self._norm = norm
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down.onto(x, self._gate_up(self._norm(x)))
