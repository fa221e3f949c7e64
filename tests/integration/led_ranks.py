"""Rank processes under a real leader, without Ray: what the leader asks, and nothing else, reaches them by pipes.

`ProcessRanks.before` is told of every call just before it is made, which is the moment for a fault.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cluster.engine.ranks import ExpertPlaces, Rank, RankLost, RankRefused, Superseded
from tests.integration.rank_process import HOST, RankProcess
from workers.report import ExpertLoads, Holdings, RankAddress, RankStatus
from workers.settings import EngineSettings

__all__ = ["ProcessRanks"]

_WAIT_S = 1.0


class ProcessRank:
    """See `cluster.engine.ranks.Rank`."""

    def __init__(self, number: int, process: RankProcess, ranks: ProcessRanks) -> None:
        self.number = number
        self.process = process
        self._ranks = ranks

    async def open(self) -> RankAddress:
        return RankAddress(**await self._ask("open", HOST))

    async def join(self, generation: int, store: tuple[str, int], addresses: Sequence[RankAddress]) -> None:
        await self._ask("join", generation, *store, self._seen(addresses))

    async def load(self) -> None:
        await self._ask("load")

    async def load_progress(self) -> tuple[int, int]:
        done, total = await self._ask("load_progress")
        return done, total

    async def start(self) -> str | None:
        return await self._ask("start")  # type: ignore[no-any-return]

    async def trouble(self, generation: int) -> str:
        reason = ""
        while not reason:
            reason = await self._ask("trouble", generation, _WAIT_S)
        return reason

    async def interrupt(self, generation: int, timeout_s: float) -> Holdings:
        return TypeAdapter(Holdings).validate_python(await self._ask("interrupt", generation, timeout_s))

    async def out_of_reach(self, addresses: Sequence[RankAddress], timeout_s: float) -> list[int]:
        return await self._ask("out_of_reach", self._seen(addresses), timeout_s)  # type: ignore[no-any-return]

    async def regroup(
        self,
        generation: int,
        store: tuple[str, int],
        addresses: Sequence[RankAddress],
        epoch: int,
        placements: Sequence[ExpertPlaces],
    ) -> int:
        seen = self._seen(addresses)
        return await self._ask("regroup", generation, *store, seen, epoch, placements)  # type: ignore[no-any-return]

    async def probe(self, timeout_s: float) -> float:
        return await self._ask("probe", timeout_s)  # type: ignore[no-any-return]

    async def status(self) -> RankStatus:
        return TypeAdapter(RankStatus).validate_python(await self._ask("status"))

    async def expert_loads(self) -> ExpertLoads | None:
        return TypeAdapter(ExpertLoads | None).validate_python(await self._ask("expert_loads"))

    async def stage_experts(self, epoch: int, placements: Sequence[ExpertPlaces]) -> None:
        await self._ask("stage_experts", epoch, placements)

    async def switch_experts(self, epoch: int, timeout_s: float) -> None:
        await self._ask("switch_experts", epoch, timeout_s)

    async def renew(self, lease_s: float) -> None:
        await self._ask("renew", lease_s)

    async def drain(self, timeout_s: float) -> bool:
        return await self._ask("drain", timeout_s)  # type: ignore[no-any-return]

    async def lost(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            if self.process.process.poll() is not None:
                raise RankLost(f"rank {self.number} died")

    def _seen(self, addresses: Sequence[RankAddress]) -> list[dict[str, Any]]:
        ports = self._ranks.seen.get(self.number, {})
        found = []
        for one in addresses:
            port = ports.get(one.rank, one.plan_port)
            found.append({"rank": one.rank, "host": one.host, "plan_port": port, "pid": one.pid})
        return found

    async def _ask(self, method: str, *arguments: object) -> Any:
        self._ranks.before(self, method)
        try:
            return await asyncio.wrap_future(self.process.begin(method, *arguments))
        except RuntimeError as error:
            told = str(error)
        kind = told.partition(":")[0]
        if kind == "Outdated":
            raise Superseded(told)
        if kind in ("ValueError", "MemoryError"):
            raise RankRefused(told)
        raise RankLost(f"rank {self.number}: {told.splitlines()[0]}")


class ProcessRanks:
    """See `cluster.engine.ranks.Ranks`. `seen` has, by rank, ports at which it sees others instead of their own."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._num_started = 0
        self.living: dict[int, ProcessRank] = {}
        self.orphans: dict[int, ProcessRank] = {}
        self.before: Callable[[ProcessRank, str], None] = lambda rank, method: None
        self.seen: dict[int, dict[int, int]] = {}
        self.num_sets = 0

    async def adopt(self) -> dict[int, Rank]:
        return {number: rank for number, rank in self.living.items() if rank.process.process.poll() is None}

    async def place(self) -> dict[int, Rank]:
        self.num_sets += 1
        return await self.replace(range(self._settings.plan.num_ranks))

    async def replace(self, numbers: Sequence[int]) -> dict[int, Rank]:
        for number in numbers:
            await self.fence(number, None)
            folder = self._folder / str(self._num_started)
            self._num_started += 1
            folder.mkdir()
            self.living[number] = ProcessRank(number, RankProcess(folder, self._settings, number), self)
        return {number: self.living[number] for number in numbers}

    async def fence(self, number: int, address: RankAddress | None) -> None:
        if number in self.living:
            await asyncio.to_thread(self.living.pop(number).process.end)

    async def clear(self) -> None:
        for number in list(self.living):
            await self.fence(number, None)

    def kill(self, number: int, how: signal.Signals = signal.SIGKILL) -> None:
        """Now."""
        os.kill(self.living[number].process.process.pid, how)
