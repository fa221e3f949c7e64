"""The seam between a leader and its ranks: the real one is Ray's (`cluster.engine.placement`), tests have a fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from workers.report import ExpertLoads, Holdings, RankAddress, RankStatus

__all__ = ["BESIDE_NICENESS", "ExpertPlaces", "Rank", "RankLost", "RankRefused", "Ranks", "Superseded"]

# Of threads that load while others serve: on a machine whose cores are taken, a stream is not to wait for a load.
BESIDE_NICENESS = 10

# A layer, and for every rank of the stage the experts of its slots.
ExpertPlaces = tuple[int, tuple[tuple[int, ...], ...]]


class RankLost(Exception):
    """A rank died, hangs, does not answer or can run no step: its engine must regroup, or start again."""


class RankRefused(Exception):
    """A rank cannot do what its settings ask, however often it tries; the message is for the user."""


class Superseded(Exception):
    """A rank has heard of a newer generation: another leader leads."""


class Rank(Protocol):
    """One rank, in another process. Every call raises RankLost or RankRefused, or Superseded."""

    async def open(self) -> RankAddress: ...

    async def join(self, generation: int, store: tuple[str, int], addresses: Sequence[RankAddress]) -> None: ...

    async def load(self) -> None: ...

    async def load_progress(self) -> tuple[int, int]: ...

    async def start(self) -> str | None:
        """The address of the session server, at the first rank of each DP group."""
        ...

    async def trouble(self, generation: int) -> str:
        """Comes back when the rank can run no step of `generation` any more, with the reason."""
        ...

    async def interrupt(self, generation: int, timeout_s: float) -> Holdings:
        """Ends the generation before `generation`; what experts the rank holds."""
        ...

    async def out_of_reach(self, addresses: Sequence[RankAddress], timeout_s: float) -> list[int]:
        """Those of the ranks to which it finds no way in time."""
        ...

    async def regroup(
        self,
        generation: int,
        store: tuple[str, int],
        addresses: Sequence[RankAddress],
        epoch: int,
        placements: Sequence[ExpertPlaces],
    ) -> int:
        """Joins the members of the next generation; `start` goes on. Bytes of experts that were read for it."""
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

    async def adopt(self) -> dict[int, Rank]:
        """The living ranks of an earlier leader, by number."""
        ...

    async def place(self) -> dict[int, Rank]:
        """New processes for all ranks; nothing of old ones is left before."""
        ...

    async def replace(self, numbers: Sequence[int]) -> dict[int, Rank]:
        """New processes for some ranks, whatever is left of the old ones, beside the others. They may have to wait for
        room: their first call does."""
        ...

    async def fence(self, number: int, address: RankAddress | None) -> None:
        """Makes sure that a rank does nothing any more, even one that is frozen, where its host can be reached."""
        ...

    async def clear(self) -> None:
        """Ends every process and gives the resources back. Safe to repeat."""
        ...
