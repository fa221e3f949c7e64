"""The output head of DP groups on one host, whose weights they read once a step between them.

Each group has the whole head. But a step of few rows takes as long as reading its weights, which are many times those
of a layer, and the ranks of a host share its memory: so each computes a part of the vocabulary for all their rows,
and hands the others theirs. A rank with more rows than that is good for computes its own, and still helps the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from workers.kernels.seam import Kernels, PartialLinear
from workers.parallel.dispatch import Neighbourhood

__all__ = ["Neighbours", "SharedReadHead"]

# The ranks that are there now; None where they share no memory.
Neighbours = Callable[[], Neighbourhood | None]


class Alone(Protocol):
    """The head of one rank."""

    candidates: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class SharedReadHead:
    """See `Head`. `parts` computes `x @ weight.T`."""

    def __init__(
        self, alone: Alone, kernels: Kernels, parts: PartialLinear, weight: torch.Tensor, neighbours: Neighbours
    ) -> None:
        self._alone = alone
        self._kernels = kernels
        self._parts = parts
        self._weight = weight
        self._neighbours = neighbours

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ranks = self._together()
        if ranks is None:
            return self._alone(x)
        own = x if len(x) * ranks.size <= self._parts.most else x[:0]
        logits = self._share(own, ranks)
        if len(own) < len(x):
            return self._alone(x)
        return self._kernels.refine(logits, x, self._weight, self._alone.candidates)

    def keep_step(self, nothing: torch.Tensor) -> None:
        if (ranks := self._together()) is not None:
            self._share(nothing, ranks)

    def _together(self) -> Neighbourhood | None:
        """Those with whom the vocabulary can be cut into equal parts."""
        ranks = self._neighbours()
        if ranks is None or ranks.size == 1 or len(self._weight) % (ranks.size * self._parts.step):
            return None
        return ranks

    def _share(self, x: torch.Tensor, ranks: Neighbourhood) -> torch.Tensor:
        """Logits [T, vocabulary] of x [T, hidden], which is short on every rank; all ranks must call this."""
        size, rows = ranks.size, len(x)
        everyones, counts = ranks.counted_rows(x.repeat(size, 1), torch.full((size, 1), rows))
        theirs = counts.flatten().tolist()
        vocabulary = len(self._weight)
        if not sum(theirs):  # as all ranks know
            return x.new_empty(0, vocabulary)
        width = vocabulary // size
        first = ranks.index * width
        part = self._parts(everyones, first, first + width)
        back = ranks.rows(part, theirs, [rows] * size)
        return back.view(size, rows, width).transpose(0, 1).reshape(rows, vocabulary)
