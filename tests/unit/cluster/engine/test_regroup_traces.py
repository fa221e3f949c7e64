"""Whatever dies, freezes or is cut off, and whenever: in the end the engine serves with all its groups, generations
only rise, and no rank is ever asked for one that is over (`FakeRank` refuses that)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.leader import Pace
from cluster.engine.ranks import RankRefused
from cluster.engine.states import EngineState
from tests.unit.cluster.engine.fake_ranks import FakeRank
from tests.unit.cluster.engine.jumping_loop import JumpingLoop
from tests.unit.cluster.engine.test_leader import SETTINGS, Case
from tests.unit.cluster.engine.test_regroup import check, holding
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

CALLS = ["status", "interrupt", "out_of_reach", "regroup", "start", "renew", "probe", "open", "join", "load"]


@dataclass(frozen=True)
class Fault:
    """What happens to a rank, or between it and another, and how many seconds pass before the next fault."""

    how: str
    rank: int
    call: str
    other: int
    then_s: float


faults = st.builds(
    Fault,
    how=st.sampled_from(["kill", "freeze", "die at a call", "freeze at a call", "no memory", "cut", "newcomer dies"]),
    rank=st.integers(0, 3),
    call=st.sampled_from(CALLS),
    other=st.integers(0, 3),
    then_s=st.sampled_from([0.0, 0.0, 0.001, 0.3, 2.0, 4.0, 30.0]),
)
plans = st.sampled_from(
    [
        ParallelPlan(data=4),
        ParallelPlan(data=4, redundant_experts=4),
        ParallelPlan(data=2, tensor=2),
        ParallelPlan(data=2, pipeline=2),
    ]
)


class World:
    """A case, and the faults in force."""

    def __init__(self, engine: EngineSettings) -> None:
        self.cuts: set[tuple[int, int]] = set()
        self.doomed: dict[int, str] = {}  # newcomers, and where they die
        self.case = Case(self._prepare, engine, 0, Pace())
        self.generations: list[int] = []

    def _prepare(self, index: int, ranks: list[FakeRank]) -> None:
        if self.case.leader._settings.plan.tensor == 1:
            holding(index, ranks)
        for rank in ranks:
            rank.dies_at = self.doomed.pop(rank.rank, "")
            rank.cut_off = {a + b - rank.rank for a, b in self.cuts if rank.rank in (a, b)}

    def apply(self, fault: Fault) -> None:
        self.generations.append(self.case.leader.generation)
        living = self.case.ranks.living
        victim, other = living.get(fault.rank), living.get(fault.other)
        if fault.how == "newcomer dies":
            self.doomed[fault.rank] = fault.call
        elif victim is None:
            return
        elif fault.how == "kill":
            victim.death.set()
        elif fault.how == "freeze":
            victim.frozen = True
        elif fault.how == "die at a call":
            victim.dies_at = fault.call
        elif fault.how == "freeze at a call":
            victim.freezes_at = fault.call
        elif fault.how == "no memory":
            victim.faults["regroup"] = RankRefused("no memory for 2 more experts")
        elif other is not None and other is not victim:
            self.cuts.add((fault.rank, fault.other))
            victim.cut_off.add(fault.other)
            other.cut_off.add(fault.rank)
        if fault.how in ("kill", "freeze", "cut"):  # the others' steps do not end
            for rank in living.values():
                rank.troubled.set()

    def heal(self) -> None:
        self.cuts.clear()
        self.doomed.clear()
        for rank in self.case.ranks.living.values():
            rank.faults.clear()
            rank.cut_off.clear()
            rank.dies_at = rank.freezes_at = ""

    @property
    def whole(self) -> bool:
        leader = self.case.leader
        return leader.state is EngineState.READY and len(leader.groups()) == leader._settings.plan.data


async def _live(plan: ParallelPlan, trace: Sequence[Fault]) -> None:
    world = World(replace(SETTINGS, plan=plan))
    running = asyncio.create_task(world.case.leader.run())
    try:
        async with asyncio.timeout(600):
            await world.case.until(lambda: world.whole)
            for fault in trace:
                world.apply(fault)
                await asyncio.sleep(fault.then_s)
            world.heal()
            await asyncio.sleep(120)  # nothing is wrong any more: what is lost has been noticed and is back
            await world.case.until(lambda: world.whole)
        check(world.case)
        assert world.generations == sorted(world.generations)
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(plans, st.lists(faults, max_size=6))
def test_an_engine_serves_in_the_end(plan: ParallelPlan, trace: list[Fault]) -> None:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(_live(plan, trace))
