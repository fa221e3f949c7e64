"""Root-mean-square normalisation with its weight."""

from __future__ import annotations

import torch

from workers.kernels.seam import Kernels

__all__ = ["RMSNorm"]


class RMSNorm:
    __slots__ = ("_epsilon", "_norm", "_weight")

    def __init__(self, weight: torch.Tensor, epsilon: float, kernels: Kernels) -> None:
        self._weight = weight
        self._epsilon = epsilon
        self._norm = kernels.rms_norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self._weight, self._epsilon)
