"""Ranks that do as they are told, in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cluster.engine.ranks import ExpertPlaces, Rank, RankLost, RankRefused, Superseded
from workers.parallel.plan import ParallelPlan
from workers.report import ExpertLoads, Holdings, RankAddress, RankState, RankStatus


@dataclass
class FakeRank:
    """Notes every call; `faults` maps a call to the exception it ends in, or to None where it never answers.

    `dies_at` and `freezes_at` name calls at which that begins for good.
    """

    rank: int
    plan: ParallelPlan
    calls: list[str] = field(default_factory=list)
    faults: dict[str, Exception | None] = field(default_factory=dict)
    generation: int = 0
    state: RankState = RankState.NEW
    addresses: Sequence[RankAddress] = ()
    store: tuple[str, int] = ("", -1)
    loads: ExpertLoads | None = None
    staged: tuple[int, list[ExpertPlaces]] | None = None
    death: asyncio.Event = field(default_factory=asyncio.Event)
    troubled: asyncio.Event = field(default_factory=asyncio.Event)
    newest: int = 0
    holdings: Holdings = field(default_factory=Holdings)
    cut_off: set[int] = field(default_factory=set)
    dies_at: str = ""
    freezes_at: str = ""
    frozen: bool = False
    called: asyncio.Event = field(default_factory=asyncio.Event)

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        self.called.set()
        await asyncio.sleep(0)
        if name == self.dies_at:
            self.death.set()
        self.frozen |= name == self.freezes_at
        if self.frozen and not self.death.is_set():
            await self.death.wait()  # which is what fencing brings
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
        self.generation = self.newest = generation
        self.store, self.addresses = store, addresses

    async def trouble(self, generation: int) -> str:
        await self._called("trouble")
        assert self.generation == generation
        await self.troubled.wait()
        return "a peer has gone"

    async def interrupt(self, generation: int, timeout_s: float) -> Holdings:
        await self._called("interrupt")
        if generation <= self.newest:
            raise Superseded(f"generation {generation} is over")
        self.newest = generation
        if self.state is RankState.RUNNING:
            self.state = RankState.INTERRUPTED
        return self.holdings

    async def out_of_reach(self, addresses: Sequence[RankAddress], timeout_s: float) -> list[int]:
        await self._called("out_of_reach")
        return sorted(address.rank for address in addresses if address.rank in self.cut_off and address.plan_port)

    async def regroup(
        self,
        generation: int,
        store: tuple[str, int],
        addresses: Sequence[RankAddress],
        epoch: int,
        placements: Sequence[ExpertPlaces],
    ) -> int:
        await self._called("regroup")
        assert generation == self.newest
        assert self.state in (RankState.INTERRUPTED, RankState.NEW)
        self.generation, self.store, self.addresses = generation, store, addresses
        stage = self.plan.stage_ranks(self.plan.place(self.rank).stage)
        place = [address.rank for address in addresses if address.rank in stage].index(self.rank)
        assert [layer for layer, _ in placements] == list(self.holdings.layers), "its stage's, and no others"
        self.holdings = replace(self.holdings, epoch=epoch, experts=tuple(slots[place] for _, slots in placements))
        return 0

    async def load(self) -> None:
        await self._called("load")

    async def load_progress(self) -> tuple[int, int]:
        await self._called("load_progress")
        return 1, 2

    async def start(self) -> str | None:
        await self._called("start")
        self.state = RankState.RUNNING
        self.troubled.clear()
        return self.session or None

    async def probe(self, timeout_s: float) -> float:
        assert self.first
        await self._called("probe")
        return 0.01

    async def status(self) -> RankStatus:
        await self._called("status")
        return RankStatus(
            rank=self.rank,
            dp_group=self.plan.place(self.rank).dp_group,
            state=self.state,
            reason="",
            host="h",
            pid=1,
            generation=self.generation,
            newest_generation=self.newest,
            plan_port=1000 + self.rank if self.first else 0,
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
    def first(self) -> bool:
        return self.plan.place(self.rank).first_in_group

    @property
    def session(self) -> str:
        return f"[::1]:{2000 + self.rank}" if self.first else ""


class FakeRanks:
    """`prepare` is called with each new set of ranks and the number of sets made before it.

    Ranks that are replaced are sets too. `room` is awaited before one can be opened.
    """

    def __init__(self, plan: ParallelPlan, prepare: Callable[[int, list[FakeRank]], None]) -> None:
        self._plan = plan
        self._prepare = prepare
        self.sets: list[list[FakeRank]] = []
        self.living: dict[int, FakeRank] = {}
        self.orphans: list[FakeRank] = []
        self.fenced: list[int] = []
        self.num_cleared = 0
        self.room = asyncio.Event()
        self.room.set()

    def make(self, numbers: Sequence[int] | None = None) -> list[FakeRank]:
        return [FakeRank(rank, self._plan) for rank in (range(self._plan.num_ranks) if numbers is None else numbers)]

    async def adopt(self) -> dict[int, Rank]:
        orphans, self.orphans = self.orphans, []
        self.living = {rank.rank: rank for rank in orphans}
        return dict(self.living)

    async def place(self) -> dict[int, Rank]:
        return self._made(self.make())

    async def replace(self, numbers: Sequence[int]) -> dict[int, Rank]:
        for number in numbers:
            if number in self.living:
                self.living[number].death.set()
        await self.room.wait()
        return self._made(self.make(numbers))

    def _made(self, ranks: list[FakeRank]) -> dict[int, Rank]:
        self._prepare(len(self.sets), ranks)
        self.sets.append(ranks)
        self.living |= {rank.rank: rank for rank in ranks}
        return {rank.rank: rank for rank in ranks}

    async def fence(self, number: int, address: RankAddress | None) -> None:
        self.fenced.append(number)
        self.living.pop(number).death.set()

    async def clear(self) -> None:
        for rank in self.living.values():
            rank.death.set()
        self.living = {}
        self.num_cleared += 1


__all__ = ["FakeRank", "FakeRanks", "RankLost", "RankRefused"]
