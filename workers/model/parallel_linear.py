"""The ends of a tensor-parallel block: where the ranks' partial sums meet, and where the vocabulary is cut.

Each has a form for one rank and one for several; the model holds one or the other and cannot tell them apart.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from workers.kernels.seam import Linear
from workers.parallel.collectives import Collectives

__all__ = ["Embedding", "ResidualLinear", "embedding", "residual_linear"]


class ResidualLinear(Protocol):
    """The last projection of a block and the residual sum behind it."""

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual` plus the projection of x over all ranks; may overwrite `residual`."""
        ...


class Embedding(Protocol):
    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows [T, hidden], in memory of their own."""
        ...


def residual_linear(linear: Linear, tensor: Collectives) -> ResidualLinear:
    """`linear` holds this rank's columns; where it has a bias, only one rank does."""
    return linear if tensor.size == 1 else _ReducedLinear(linear, tensor)


def embedding(weight: torch.Tensor, first: int, tensor: Collectives) -> Embedding:
    """`weight` holds the rows of token ids from `first` on."""
    return _WholeEmbedding(weight) if tensor.size == 1 else _CutEmbedding(weight, first, tensor)


class _ReducedLinear:
    __slots__ = ("_linear", "_tensor")

    def __init__(self, linear: Linear, tensor: Collectives) -> None:
        self._linear = linear
        self._tensor = tensor

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(self._tensor.all_reduce(self._linear(x)))


class _WholeEmbedding:
    __slots__ = ("_weight",)

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._weight.index_select(0, token_ids)


class _CutEmbedding:
    __slots__ = ("_first", "_tensor", "_weight")

    def __init__(self, weight: torch.Tensor, first: int, tensor: Collectives) -> None:
        self._weight = weight
        self._first = first
        self._tensor = tensor

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        local = token_ids - self._first
        ours = (local >= 0) & (local < len(self._weight))
        rows = F.embedding(local.where(ours, 0), self._weight)
        return self._tensor.all_reduce(rows.masked_fill_(~ours[:, None], 0.0))
