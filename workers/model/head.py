"""The output head: logits over the vocabulary, exact where it matters.

A linear layer in bf16 sums in fp32 and then rounds: logits near 25 come out in steps of 1/8, and the two likeliest
tokens are often equal, so that the lower id wins. The likeliest few of each row are therefore computed again in fp32
from the same weights, which costs a hundredth of the layer; the others keep their rounding.
"""

from __future__ import annotations

from typing import Protocol

import torch

from workers.kernels.seam import Linear
from workers.parallel.collectives import Collectives

__all__ = ["CANDIDATES", "Head", "head", "refine"]

CANDIDATES = 32
_ROWS = 64  # at a time: their candidates' weights are gathered in fp32


class Head(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Logits [T, vocabulary] in fp32 at index 0 of the tensor axis; None at the others."""
        ...


def head(linear: Linear, weight: torch.Tensor, vocab_size: int, tensor: Collectives) -> Head:
    """`linear` computes `x @ weight.T`; both hold this rank's rows, as many on each rank, and those past `vocab_size`
    are dropped.
    """
    whole = _WholeHead(linear, weight)
    return whole if tensor.size == 1 else _CutHead(whole, vocab_size, tensor)


def refine(logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`logits` [T, vocabulary] in fp32, the `CANDIDATES` largest of each row as exact as fp32 sums make them."""
    if logits.dtype == torch.float32:
        return logits
    refined = logits.float()
    candidates = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1, sorted=False).indices
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        exact = (weight[candidates[rows]].float() * x[rows].float().unsqueeze(1)).sum(dim=-1)
        refined[rows].scatter_(1, candidates[rows], exact)
    return refined


class _WholeHead:
    __slots__ = ("_linear", "_weight")

    def __init__(self, linear: Linear, weight: torch.Tensor) -> None:
        self._linear = linear
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return refine(self._linear(x), x, self._weight)


class _CutHead:
    __slots__ = ("_tensor", "_vocab_size", "_whole")

    def __init__(self, whole: _WholeHead, vocab_size: int, tensor: Collectives) -> None:
        self._whole = whole
        self._vocab_size = vocab_size
        self._tensor = tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        logits = self._tensor.gather(self._whole(x))
        return None if logits is None else logits[:, : self._vocab_size]
