"""Ranks that do as they are told, in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cluster.engine.ranks import ExpertPlaces, Rank, RankLost, RankRefused
from workers.report import ExpertLoads, RankAddress, RankState, RankStatus


@dataclass
class FakeRank:
    """Notes every call; `faults` maps a call to the exception it ends in, or to None where it never answers."""

    rank: int
    first: bool
    calls: list[str] = field(default_factory=list)
    faults: dict[str, Exception | None] = field(default_factory=dict)
    generation: int = 0
    state: RankState = RankState.NEW
    addresses: Sequence[RankAddress] = ()
    store: tuple[str, int] = ("", -1)
    loads: ExpertLoads | None = None
    staged: tuple[int, list[ExpertPlaces]] | None = None
    death: asyncio.Event = field(default_factory=asyncio.Event)

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(0)
        if self.death.is_set():
            raise RankLost(f"rank {self.rank} died")
        if name in self.faults:
            fault = self.faults[name]
            if fault is None:
                await asyncio.Event().wait()
            else:
                raise fault

    async def open(self) -> RankAddress:
        await self._called("open")
        return RankAddress(self.rank, f"host-{self.rank}", 1000 + self.rank if self.first else 0, 1)

    async def join(self, generation: int, store: tuple[str, int], addresses: Sequence[RankAddress]) -> None:
        await self._called("join")
        self.generation, self.store, self.addresses = generation, store, addresses

    async def load(self) -> None:
        await self._called("load")

    async def load_progress(self) -> tuple[int, int]:
        await self._called("load_progress")
        return 1, 2

    async def start(self) -> str | None:
        await self._called("start")
        self.state = RankState.RUNNING
        return self.session or None

    async def probe(self, timeout_s: float) -> float:
        assert self.first
        await self._called("probe")
        return 0.01

    async def status(self) -> RankStatus:
        await self._called("status")
        return RankStatus(
            rank=self.rank,
            dp_group=self.rank,
            state=self.state,
            reason="",
            host="h",
            pid=1,
            generation=self.generation,
            device="cpu",
            dtype="float32",
            threads=1,
            block_size=16,
            session=self.session,
            collectives="gloo",
        )

    async def expert_loads(self) -> ExpertLoads | None:
        await self._called("expert_loads")
        return self.loads

    async def stage_experts(self, epoch: int, placements: Sequence[ExpertPlaces]) -> None:
        await self._called("stage_experts")
        self.staged = (epoch, list(placements))

    async def switch_experts(self, epoch: int, timeout_s: float) -> None:
        await self._called("switch_experts")
        assert self.loads is not None
        assert self.staged is not None
        assert self.staged[0] == epoch == self.loads.epoch + 1
        slots = dict(zip(self.loads.layers, self.loads.slots, strict=True)) | dict(self.staged[1])
        self.loads = replace(self.loads, epoch=epoch, slots=tuple(slots.values()))

    async def renew(self, lease_s: float) -> None:
        await self._called("renew")

    async def drain(self, timeout_s: float) -> bool:
        await self._called("drain")
        return True

    async def lost(self) -> None:
        await self.death.wait()
        raise RankLost(f"rank {self.rank} died")

    @property
    def session(self) -> str:
        return f"[::1]:{2000 + self.rank}" if self.first else ""


class FakeRanks:
    """`prepare` is called with each new set of ranks and the number of sets made before it."""

    def __init__(self, num_ranks: int, group_size: int, prepare: Callable[[int, list[FakeRank]], None]) -> None:
        self._num_ranks = num_ranks
        self._group_size = group_size
        self._prepare = prepare
        self.sets: list[list[FakeRank]] = []
        self.orphans: list[FakeRank] = []
        self.num_cleared = 0

    def make(self) -> list[FakeRank]:
        return [FakeRank(rank, rank % self._group_size == 0) for rank in range(self._num_ranks)]

    async def adopt(self) -> Sequence[Rank]:
        orphans, self.orphans = self.orphans, []
        return orphans

    async def place(self) -> Sequence[Rank]:
        ranks = self.make()
        self._prepare(len(self.sets), ranks)
        self.sets.append(ranks)
        return ranks

    async def clear(self) -> None:
        self.num_cleared += 1


__all__ = ["FakeRank", "FakeRanks", "RankLost", "RankRefused"]
