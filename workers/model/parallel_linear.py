"""The ends of a tensor-parallel block: where the ranks' partial sums meet, and where the vocabulary is cut.

Each has a form for one rank and one for several; the model holds one or the other and cannot tell them apart.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from workers.kernels.seam import Linear
from workers.parallel.collectives import Collectives

__all__ = ["Embedding", "ResidualLinear", "embedding"]


class Embedding(Protocol):
    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows [T, hidden] in fp32, in memory of their own."""
        ...


def embedding(weight: torch.Tensor, first: int, tensor: Collectives) -> Embedding:
    """`weight` holds the rows of token ids from `first` on."""
    return _WholeEmbedding(weight) if tensor.size == 1 else _CutEmbedding(weight, first, tensor)


class ResidualLinear:
    """The last projection of a block and the residual sum behind it, which is in fp32 whatever the model's dtype."""

    __slots__ = ("_linear", "_tensor")

    def __init__(self, linear: Linear, tensor: Collectives) -> None:
        """`linear` holds this rank's columns; where it has a bias, only one rank does."""
        self._linear = linear
        self._tensor = tensor

    def onto(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual` [T, hidden], to which the projection of x over all ranks has been added."""
        return residual.add_(self._tensor.all_reduce(self._linear(x)))


class _WholeEmbedding:
    __slots__ = ("_weight",)

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._weight.index_select(0, token_ids).float()


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
        return self._tensor.all_reduce(rows.masked_fill_(~ours[:, None], 0.0)).float()
