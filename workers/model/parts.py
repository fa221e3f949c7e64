"""What every block is built from: a shard's parameters, taken one after the other, made into layers by the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.kernels.seam import GatedLinear, Kernels, Linear, Norm
from workers.model.parallel_linear import ResidualLinear, residual_linear
from workers.model.shard import Shard
from workers.parallel.collectives import Collectives

__all__ = ["Parts", "Take"]

# A parameter of the shard by name, on the model's device; None where the shard has none of that name.
Take = Callable[[str], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Parts:
    shard: Shard
    take: Take
    kernels: Kernels
    tensor: Collectives

    def need(self, name: str) -> torch.Tensor:
        tensor = self.take(name)
        assert tensor is not None, name
        return tensor

    def linear(self, name: str) -> Linear:
        return self.kernels.linear(self.need(f"{name}.weight"), self.take(f"{name}.bias"))

    def gated_linear(self, name: str) -> GatedLinear:
        return self.kernels.gated_linear(self.need(f"{name}.weight"), self.take(f"{name}.bias"))

    def residual(self, name: str) -> ResidualLinear:
        return residual_linear(self.linear(name), self.tensor)

    def norm(self, name: str, epsilon: float | None = None) -> Norm:
        """With the model's epsilon where none is given."""
        return self.kernels.rms_norm(self.need(name), epsilon or self.shard.config.rms_norm_eps)
