"""What a model asks of the ranks it is cut over."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Collectives", "SingleRank"]


class Collectives(Protocol):
    """The collectives of one axis; `index` is this rank's place on it.

    Every call must be made by all ranks of the axis in the same order. A peer's death or a step timeout raises
    RuntimeError.
    """

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def kind(self) -> str:
        """What carries the bytes, in words for `shoal status`."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the axis, in the dtype of `x`; may work in place."""
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """The ranks' `x` joined along the last dimension at index 0; None at the others."""
        ...

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' values."""
        ...


class SingleRank:
    """An axis of one rank."""

    size = 1
    index = 0
    kind = "none (one rank)"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        return x

    def minimum(self, value: int) -> int:
        return value
