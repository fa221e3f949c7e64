"""A leader and its ranks: coming up, losing one, being refused, taking over, going down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from cluster.engine.leader import Leader, Pace
from cluster.engine.ranks import RankLost, RankRefused
from cluster.engine.states import EngineState
from cluster.front_door.groups import GroupAddress
from scheduler.experts import contiguous
from tests.unit.cluster.engine.fake_ranks import FakeRank, FakeRanks
from workers.parallel.plan import ParallelPlan
from workers.report import ExpertLoads, RankState
from workers.settings import EngineSettings, ExpertBalance

PACE = Pace(
    renew_every_s=0.001,
    answer_timeout_s=0.1,
    rest_timeout_s=0.1,
    probe_every_s=0.001,
    probe_timeout_s=0.2,
    call_timeout_s=0.2,
    start_timeout_s=0.2,
    progress_every_s=0.001,
    look_every_s=0.001,
    first_backoff_s=0.001,
    max_starts=3,
)
SETTINGS = EngineSettings(
    engine="engine-0",
    model_name="m",
    model_path="/m",
    plan=ParallelPlan(data=2, tensor=2),
    dtype="float32",
    device="cpu",
    max_model_len=128,
    load_timeout_s=0.5,
)


@dataclass
class Store:
    host: str
    port: int = 77


@dataclass(frozen=True)
class Moment:
    state: EngineState
    groups: tuple[GroupAddress, ...]
    error: str


class Case:
    """A leader over fake ranks. `until` waits for what the leader's changes bring about."""

    def __init__(
        self,
        prepare: Callable[[int, list[FakeRank]], None],
        settings: EngineSettings,
        generation: int,
        pace: Pace = PACE,
    ) -> None:
        self.ranks = FakeRanks(settings.plan, prepare)
        self.num_stores = 0
        self._changed = asyncio.Event()
        self._history: list[Moment] = []
        self._seen = 0
        self.leader = Leader(settings, self.ranks, self._store, self._note, generation=generation, pace=pace)

    def _note(self) -> None:
        self._history.append(Moment(self.leader.state, self.leader.groups(), self.leader.error))
        self._changed.set()

    def _store(self, host: str) -> Store:
        self.num_stores += 1
        return Store(host)

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    async def until_state(self, state: EngineState) -> Moment:
        """The next moment in that state, behind the one that was waited for before."""
        await self.until(lambda: any(moment.state is state for moment in self._history[self._seen :]))
        self._seen = next(i for i in range(self._seen, len(self._history)) if self._history[i].state is state) + 1
        return self._history[self._seen - 1]


def nothing(index: int, ranks: list[FakeRank]) -> None:
    del index, ranks


@asynccontextmanager
async def leading(
    prepare: Callable[[int, list[FakeRank]], None] = nothing,
    *,
    settings: EngineSettings = SETTINGS,
    generation: int = 0,
    orphans: Callable[[FakeRanks], list[FakeRank]] = lambda ranks: [],
    pace: Pace = PACE,
    patience_s: float = 10.0,
) -> AsyncIterator[Case]:
    case = Case(prepare, settings, generation, pace)
    case.ranks.orphans = orphans(case.ranks)
    async with asyncio.timeout(patience_s):
        running = asyncio.create_task(case.leader.run())
        try:
            yield case
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_ranks_are_brought_up_in_order() -> None:
    async with leading() as case:
        assert (await case.until_state(EngineState.PROBING)).groups == ()
        await case.until_state(EngineState.READY)
        (ranks,) = case.ranks.sets
        for rank in ranks:
            steps = [name for name in rank.calls if name in {"open", "join", "load", "start"}]
            assert steps == ["open", "join", "load", "start"]
            assert [address.rank for address in rank.addresses] == [0, 1, 2, 3]
            assert rank.store == ("host-0", 77)
            assert rank.generation == case.leader.generation == 1
        assert [(group.key, group.host, group.port) for group in case.leader.groups()] == [
            ("engine-0/0", "::1", 2000),
            ("engine-0/1", "::1", 2002),
        ]
        status = case.leader.status()
        assert (status.state, status.collectives, len(status.ranks)) == ("ready", "gloo", 4)


async def test_one_rank_needs_no_store() -> None:
    async with leading(settings=replace(SETTINGS, plan=ParallelPlan())) as case:
        await case.until_state(EngineState.READY)
        assert case.num_stores == 0


async def test_a_token_is_asked_of_every_group_and_leases_are_renewed() -> None:
    async with leading() as case:
        await case.until_state(EngineState.READY)
        (ranks,) = case.ranks.sets
        give_up_s = time.monotonic() + 10
        while min(rank.calls.count("renew") for rank in ranks) < 2 or ranks[2].calls.count("probe") < 2:
            assert time.monotonic() < give_up_s
            await asyncio.sleep(0.01)
        assert [rank.calls.count("probe") > 1 for rank in ranks] == [True, False, True, False]


ALONE = replace(SETTINGS, plan=ParallelPlan(tensor=2))


async def test_a_dead_rank_of_a_lone_group_takes_the_engine_down_and_up() -> None:
    async with leading(settings=ALONE) as case:
        await case.until_state(EngineState.READY)
        cleared = case.ranks.num_cleared
        case.ranks.sets[0][1].death.set()
        moment = await case.until_state(EngineState.RESTARTING)
        assert moment.groups == ()
        assert moment.error == "rank 1 died"
        await case.until_state(EngineState.READY)
        assert case.leader.generation == 2
        assert case.ranks.num_cleared > cleared
        assert {group.generation for group in case.leader.groups()} == {2}
        assert case.num_stores == 1, "the store outlives the ranks"


@pytest.mark.parametrize("fault", [RankLost("no token"), RankRefused("no token"), None])
@pytest.mark.parametrize("call", ["probe", "renew"])
async def test_a_rank_that_does_not_answer_any_more_is_lost(call: str, fault: Exception | None) -> None:
    async with leading(settings=ALONE) as case:
        await case.until_state(EngineState.READY)
        case.ranks.sets[0][0].faults[call] = fault
        await case.until_state(EngineState.RESTARTING)
        await case.until_state(EngineState.READY)
        assert case.leader.generation == 2


async def test_a_rank_whose_group_failed_is_lost_although_it_answers() -> None:
    async with leading(settings=ALONE) as case:
        await case.until_state(EngineState.READY)
        case.ranks.sets[0][1].state = RankState.BROKEN
        moment = await case.until_state(EngineState.RESTARTING)
        assert moment.error == "rank 1 is broken"
        await case.until_state(EngineState.READY)


@pytest.mark.parametrize("call", ["open", "join", "load", "start", "probe"])
async def test_a_failure_on_the_way_up_is_tried_again(call: str) -> None:
    def prepare(index: int, ranks: list[FakeRank]) -> None:
        if index == 0:
            ranks[0].faults[call] = RankLost("it broke")

    async with leading(prepare) as case:
        await case.until_state(EngineState.READY)
        assert len(case.ranks.sets) == 2
        assert case.leader.generation == 2


async def test_a_refusal_is_final_and_says_why() -> None:
    def prepare(index: int, ranks: list[FakeRank]) -> None:
        ranks[1].faults["load"] = RankRefused("model.safetensors is cut short")

    async with leading(prepare) as case:
        await case.until_state(EngineState.FAILED)
        assert case.leader.error == "model.safetensors is cut short"
        assert len(case.ranks.sets) == 1
        assert case.ranks.num_cleared >= 1
        assert case.leader.groups() == ()


async def test_it_gives_up_after_so_many_starts() -> None:
    def prepare(index: int, ranks: list[FakeRank]) -> None:
        ranks[0].faults["load"] = RankLost("out of memory")

    async with leading(prepare) as case:
        await case.until_state(EngineState.FAILED)
        assert len(case.ranks.sets) == PACE.max_starts + 1
        assert "gave up" in case.leader.error
        assert "out of memory" in case.leader.error


def orphans_of_generation(generation: int) -> Callable[[FakeRanks], list[FakeRank]]:
    def make(ranks: FakeRanks) -> list[FakeRank]:
        orphans = ranks.make()
        for orphan in orphans:
            orphan.generation, orphan.state = generation, RankState.RUNNING
        return orphans

    return make


async def test_a_new_leader_takes_living_ranks_over_as_they_are() -> None:
    adopted: list[FakeRank] = []

    def orphans(ranks: FakeRanks) -> list[FakeRank]:
        adopted.extend(orphans_of_generation(5)(ranks))
        return adopted

    async with leading(generation=5, orphans=orphans) as case:
        moment = await case.until_state(EngineState.PROBING)
        assert [group.port for group in moment.groups] == [2000, 2002], "they never stopped"
        await case.until_state(EngineState.READY)
        assert case.ranks.sets == []
        assert case.ranks.num_cleared == 0
        assert case.leader.generation == 5
        assert [group.port for group in case.leader.groups()] == [2000, 2002]
        assert all("load" not in rank.calls for rank in adopted)


SPOILS: list[Callable[[list[FakeRank]], None]] = [
    lambda ranks: setattr(ranks[1], "generation", 4),
    lambda ranks: setattr(ranks[1], "state", RankState.BROKEN),
    lambda ranks: ranks[1].death.set(),
    lambda ranks: ranks[1].faults.update(status=None),
]


def spoilt(spoil: Callable[[list[FakeRank]], None]) -> Callable[[FakeRanks], list[FakeRank]]:
    def orphans(ranks: FakeRanks) -> list[FakeRank]:
        made = orphans_of_generation(5)(ranks)
        spoil(made)
        return made

    return orphans


@pytest.mark.parametrize("spoil", SPOILS)
async def test_ranks_of_a_lone_group_that_do_not_belong_together_are_replaced(
    spoil: Callable[[list[FakeRank]], None],
) -> None:
    async with leading(settings=ALONE, generation=5, orphans=spoilt(spoil)) as case:
        await case.until_state(EngineState.READY)
        assert case.ranks.num_cleared >= 1
        assert case.leader.generation == 6, "newer than whatever the old ranks may still say"


@pytest.mark.parametrize("spoil", SPOILS)
async def test_whole_groups_are_taken_over_and_the_others_come_back(spoil: Callable[[list[FakeRank]], None]) -> None:
    async with leading(generation=5, orphans=spoilt(spoil)) as case:
        await case.until_state(EngineState.READY)
        await case.until(lambda: len(case.leader.groups()) == 2 and case.leader.state is EngineState.READY)
        assert case.ranks.num_cleared == 0
        assert case.leader.generation > 5
        assert all(rank.state is RankState.RUNNING for rank in case.ranks.living.values())
        assert {rank.generation for rank in case.ranks.living.values()} == {case.leader.generation}


async def test_a_leader_that_is_cancelled_leaves_its_ranks() -> None:
    async with leading() as case:
        await case.until_state(EngineState.READY)
        cleared = case.ranks.num_cleared
    assert case.ranks.num_cleared == cleared


async def test_draining_and_stopping() -> None:
    async with leading() as case:
        await case.until_state(EngineState.READY)
    await case.leader.drain(0.1)
    assert case.leader.state is EngineState.DRAINING
    assert all("drain" in rank.calls for rank in case.ranks.sets[0])
    assert case.leader.groups() == ()
    await case.leader.stop()
    assert case.leader.status().state == "stopped"


async def test_progress_is_told_while_loading() -> None:
    def prepare(index: int, ranks: list[FakeRank]) -> None:
        if index == 0:
            ranks[0].faults["load"] = None

    async with leading(prepare) as case:
        await case.until(lambda: case.leader.progress == 0.5)
        assert case.leader.state is EngineState.LOADING
        await case.until(lambda: case.leader.generation == 2 and case.leader.state is EngineState.READY)
        assert case.leader.progress == 1.0


LOADS = ExpertLoads(
    epoch=0, layers=(1, 2), counts=((40, 40, 40, 40, 1, 1, 1, 1), (1,) * 8), slots=(contiguous(8, 4).slots,) * 2
)


def with_experts(index: int, ranks: list[FakeRank]) -> None:
    del index
    for rank in ranks:
        rank.loads = LOADS


async def test_experts_move_where_ranks_are_loaded_unevenly() -> None:
    settings = replace(SETTINGS, expert_balance=ExpertBalance(interval_s=0.01, threshold=1.5))
    async with leading(with_experts, settings=settings) as case:
        await case.until_state(EngineState.READY)
        ranks = case.ranks.sets[0]
        await case.until(lambda: case.leader.status().expert_epoch == 1)
        await case.until(lambda: case.leader.status().expert_imbalance < 1.5)
        status = case.leader.status()
        assert sum(rank.expert_tokens for rank in status.ranks) > 0
        for rank in ranks:
            assert rank.loads is not None
            assert rank.loads.slots[1] == contiguous(8, 4).slots
            assert all(len({0, 1, 2, 3} & set(held)) == 1 for held in rank.loads.slots[0])
            assert rank.calls.count("switch_experts") == 1
        assert case.leader.state is EngineState.READY


async def test_experts_that_cannot_move_stay_and_the_engine_serves() -> None:
    def refusing(index: int, ranks: list[FakeRank]) -> None:
        with_experts(index, ranks)
        ranks[3].faults["stage_experts"] = RankRefused("no memory")

    settings = replace(SETTINGS, expert_balance=ExpertBalance(interval_s=0.01, threshold=1.5))
    async with leading(refusing, settings=settings) as case:
        await case.until_state(EngineState.READY)
        ranks = case.ranks.sets[0]
        await case.until(lambda: ranks[3].calls.count("stage_experts") >= 3)
        assert case.leader.state is EngineState.READY
        assert all(rank.loads == LOADS for rank in ranks)
        assert len(case.ranks.sets) == 1
        assert case.leader.status().expert_imbalance > 1.5


async def test_experts_stay_without_being_asked() -> None:
    async with leading(with_experts, settings=replace(SETTINGS, expert_balance=None)) as case:
        await case.until_state(EngineState.READY)
        await case.until(lambda: case.leader.status().expert_imbalance > 1.5)
        assert all("stage_experts" not in rank.calls for rank in case.ranks.sets[0])
