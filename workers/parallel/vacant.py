"""Exchanges without peers: of a rank that is all there is of its axis, and of one that has yet to meet the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.parallel.dispatch import Meanwhile

__all__ = ["AwaitedExchange", "LoneExchange"]


class LoneExchange:
    """An axis of one rank, which keeps what it has; see `Exchange`."""

    size = 1
    index = 0
    kind = "none (one rank)"

    def counted_rows(
        self, x: torch.Tensor, counts: torch.Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if meanwhile is not None:
            meanwhile()
        return x, counts

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        assert list(send) == list(receive)
        return x

    def hang_up(self) -> None:
        """Nobody is there to hear it."""

    def close(self) -> None:
        """There is nothing to give back."""


class AwaitedExchange:
    """An axis whose ranks this one meets later, by when its experts are loaded; until then no step can run."""

    kind = "none (not joined yet)"

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.size = size

    def counted_rows(
        self, x: torch.Tensor, counts: torch.Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("this rank has not joined the others yet")

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        raise RuntimeError("this rank has not joined the others yet")

    def hang_up(self) -> None:
        """Nobody is there to hear it."""

    def close(self) -> None:
        """There is nothing to give back."""
