"""What every block is built from: a shard's parameters, taken one after the other, made into layers by the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.kernels.quantized import Weight
from workers.kernels.seam import GatedLinear, Kernels, Linear, Norm
from workers.model.parallel_linear import ResidualLinear
from workers.model.shard import Shard
from workers.parallel.collectives import Collectives

__all__ = ["Parts", "Take"]

# A parameter of the shard by name, on the model's device; None where the shard has none of that name.
Take = Callable[[str], Weight | None]


@dataclass(frozen=True, slots=True)
class Parts:
    shard: Shard
    take: Take
    kernels: Kernels
    tensor: Collectives

    def weight(self, name: str) -> Weight:
        """For a linear layer, quantized or not."""
        weight = self.take(name)
        assert weight is not None, name
        return weight

    def need(self, name: str) -> torch.Tensor:
        tensor = self.weight(name)
        assert isinstance(tensor, torch.Tensor), name
        return tensor

    def maybe(self, name: str) -> torch.Tensor | None:
        tensor = self.take(name)
        assert tensor is None or isinstance(tensor, torch.Tensor), name
        return tensor

    def linear(self, name: str) -> Linear:
        return self.kernels.linear(self.weight(f"{name}.weight"), self.maybe(f"{name}.bias"))

    def gated_linear(self, name: str) -> GatedLinear:
        return self.kernels.gated_linear(self.weight(f"{name}.weight"), self.maybe(f"{name}.bias"))

    def residual(self, name: str) -> ResidualLinear:
        return ResidualLinear(self.linear(name), self.tensor)

    def norm(self, name: str, epsilon: float | None = None) -> Norm:
        """With the model's epsilon where none is given."""
        return self.kernels.rms_norm(self.need(name), epsilon or self.shard.config.rms_norm_eps)
