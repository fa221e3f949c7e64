"""The seam between a leader and its ranks: the real one is Ray's (`cluster.engine.placement`), tests have a fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from workers.report import ExpertLoads, RankAddress, RankStatus

__all__ = ["ExpertPlaces", "Rank", "RankLost", "RankRefused", "Ranks"]


# A layer, and for every rank of the stage the experts of its slots.
ExpertPlaces = tuple[int, tuple[tuple[int, ...], ...]]


class RankLost(Exception):
    """A rank died, hangs or does not answer: its engine must start again."""


class RankRefused(Exception):
    """A rank cannot do what its settings ask, however often it tries; the message is for the user."""


class Rank(Protocol):
    """One rank, in another process. Every call raises RankLost or RankRefused."""

    async def open(self) -> RankAddress: ...

    async def join(self, generation: int, store: tuple[str, int], addresses: Sequence[RankAddress]) -> None: ...

    async def load(self) -> None: ...

    async def load_progress(self) -> tuple[int, int]: ...

    async def start(self) -> str | None:
        """The address of the session server, at the first rank of each DP group."""
        ...

    async def probe(self, timeout_s: float) -> float:
        """Seconds of a token through every rank of a group; asked of its first rank."""
        ...

    async def status(self) -> RankStatus: ...

    async def expert_loads(self) -> ExpertLoads | None:
        """None where the engine has no experts that can move."""
        ...

    async def stage_experts(self, epoch: int, placements: Sequence[ExpertPlaces]) -> None: ...

    async def switch_experts(self, epoch: int, timeout_s: float) -> None: ...

    async def renew(self, lease_s: float) -> None: ...

    async def drain(self, timeout_s: float) -> bool: ...

    async def lost(self) -> None:
        """Comes back only by raising RankLost."""
        ...


class Ranks(Protocol):
    """The ranks of one engine as Ray keeps them: named after the engine, outliving their leader."""

    async def adopt(self) -> Sequence[Rank]:
        """All the ranks of an earlier leader, if all of them live; else none."""
        ...

    async def place(self) -> Sequence[Rank]:
        """New processes for all ranks, in order; nothing of old ones is left before."""
        ...

    async def clear(self) -> None:
        """Ends every process and gives the resources back. Safe to repeat."""
        ...
