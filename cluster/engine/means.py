"""What every act on an engine's ranks needs, and the numbers that no two acts may share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.engine.asking import Owed
from cluster.engine.pace import Pace
from cluster.engine.ranks import Ranks
from workers.report import RankAddress
from workers.settings import EngineSettings

__all__ = ["Means", "StoreHost"]


class StoreHost(Protocol):
    """Where ranks meet; lives as long as the object."""

    host: str
    port: int


class Means:
    """One leader's; `newest` is the highest generation that was ever given out, as far as it knows."""

    def __init__(
        self,
        settings: EngineSettings,
        ranks: Ranks,
        pace: Pace,
        host_store: Callable[[str], StoreHost],
        *,
        newest: int,
    ) -> None:
        self.settings = settings
        self.ranks = ranks
        self.pace = pace
        self.newest = newest
        self.owed = Owed()
        self._host_store = host_store
        self._store: StoreHost | None = None

    def next_generation(self) -> int:
        """A number that no generation had before."""
        self.newest += 1
        return self.newest

    async def meeting_place(self, addresses: Sequence[RankAddress]) -> tuple[str, int]:
        """One rank meets nobody. The store outlives generations; each has its own part of it."""
        if len(addresses) == 1:
            return addresses[0].host, 0
        if self._store is None:
            self._store = await asyncio.to_thread(self._host_store, addresses[0].host)
        return self._store.host, self._store.port
