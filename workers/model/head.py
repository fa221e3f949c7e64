"""The output head: logits over the vocabulary, exact where it matters.

A linear layer in bf16 sums in fp32 and then rounds: logits near 25 come out in steps of 1/8, and the two likeliest
tokens are often equal, so that the lower id wins. The likeliest few of each row are therefore computed again in fp32
from the same weights, which costs a hundredth of the layer; the others keep their rounding.
"""

from __future__ import annotations

from typing import Protocol

import torch

from workers.kernels.seam import Kernels, Linear
from workers.model.shared_read_head import Neighbours, SharedReadHead
from workers.parallel.collectives import Collectives

__all__ = ["CANDIDATES", "Head", "head"]

CANDIDATES = 32


class Head(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Logits [T, vocabulary] in fp32 at index 0 of the tensor axis; None at the others."""
        ...

    def keep_step(self, nothing: torch.Tensor) -> None:
        """Joins a step for which this rank has no tokens; `nothing` is [0, hidden]."""
        ...


def head(
    kernels: Kernels,
    linear: Linear,
    weight: torch.Tensor,
    vocab_size: int,
    tensor: Collectives,
    neighbours: Neighbours | None = None,
) -> Head:
    """`linear` computes `x @ weight.T`; both hold this rank's rows, as many on each rank, and those past `vocab_size`
    are dropped. `neighbours` are the DP groups' ranks that may read it together.
    """
    whole = _WholeHead(kernels, linear, weight)
    if tensor.size == 1 and neighbours is not None and (parts := kernels.in_parts(linear)) is not None:
        return SharedReadHead(whole, kernels, parts, weight, neighbours)
    return whole if tensor.size == 1 else _CutHead(whole, vocab_size, tensor)


class _WholeHead:
    __slots__ = ("_kernels", "_linear", "_weight")

    candidates = CANDIDATES

    def __init__(self, kernels: Kernels, linear: Linear, weight: torch.Tensor) -> None:
        self._kernels = kernels
        self._linear = linear
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.refine(self._linear(x), x, self._weight, CANDIDATES)

    def keep_step(self, nothing: torch.Tensor) -> None:
        """It needs nobody."""


class _CutHead:
    __slots__ = ("_tensor", "_vocab_size", "_whole")

    def __init__(self, whole: _WholeHead, vocab_size: int, tensor: Collectives) -> None:
        self._whole = whole
        self._vocab_size = vocab_size
        self._tensor = tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        logits = self._tensor.gather(self._whole(x))
        return None if logits is None else logits[:, : self._vocab_size]

    def keep_step(self, nothing: torch.Tensor) -> None:
        """Its ranks have the same tokens, or none."""
