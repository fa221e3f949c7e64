"""A leader whose ranks are lost: who goes on, who comes back, and that nothing wedges it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from cluster.engine.pace import Pace
from cluster.engine.ranks import Rank, RankLost, RankRefused
from cluster.engine.states import EngineState
from scheduler.experts import contiguous
from tests.unit.cluster.engine.fake_ranks import FakeRank
from tests.unit.cluster.engine.jumping_loop import JumpingLoop
from tests.unit.cluster.engine.test_leader import SETTINGS, Case, leading
from workers.parallel.plan import ParallelPlan
from workers.report import Holdings, RankState

FOUR = replace(SETTINGS, plan=ParallelPlan(data=4))


def holding(index: int, ranks: list[FakeRank]) -> None:
    """Eight experts in each of two layers, spread over the ranks; of two stages each has one of the layers."""
    del index
    for rank in ranks:
        place = rank.plan.place(rank.rank)
        held = contiguous(8, rank.plan.expert).slots[place.expert_index]
        layers = (1, 2) if rank.plan.pipeline == 1 else (1 + place.stage,)
        rank.holdings = Holdings(layers=layers, experts=(held,) * len(layers), num_experts=8)


def kill(case: Case, *numbers: int) -> None:
    """Dead, and the others' collectives fail."""
    for number in numbers:
        case.ranks.living[number].death.set()
    for number, rank in case.ranks.living.items():
        if number not in numbers:
            rank.troubled.set()


async def until_whole(case: Case, generation: int) -> None:
    await case.until(
        lambda: (
            case.leader.state is EngineState.READY
            and case.leader.generation >= generation
            and len(case.leader.groups()) == case.leader._settings.plan.data
        )
    )


def check(case: Case) -> None:
    """What must hold whenever an engine is ready."""
    members = case.leader._members
    ranks = [case.ranks.living[number] for number in members.ranks]
    assert {rank.state for rank in ranks} == {RankState.RUNNING}
    assert {rank.generation for rank in ranks} == {case.leader.generation}
    assert {tuple(address.rank for address in rank.addresses) for rank in ranks} == {tuple(members.ranks)}
    held: dict[int, set[int]] = {}
    for rank in ranks:
        for layer, experts in zip(rank.holdings.layers, rank.holdings.experts, strict=True):
            held.setdefault(layer, set()).update(experts)
    assert all(found == set(range(8)) for found in held.values()), "every expert lives somewhere"
    assert {group.generation for group in case.leader.groups()} == {case.leader.generation}


async def test_survivors_go_on_and_the_lost_one_comes_back() -> None:
    async with leading(holding, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        first = case.ranks.sets[0]
        case.ranks.room.clear()
        kill(case, 2)
        moment = await case.until_state(EngineState.REGROUPING)
        assert [group.dp_group for group in moment.groups] in ([0, 1, 2, 3], [0, 1, 3])
        await case.until_state(EngineState.READY)
        assert [group.dp_group for group in case.leader.groups()] == [0, 1, 3]
        assert case.leader.lost == ("[::1]:2002",)
        assert all("load" not in rank.calls[rank.calls.index("interrupt") :] for rank in first if rank.rank != 2)
        assert [rank.holdings.experts[0] for rank in first if rank.rank != 2] == [(0, 1, 4), (2, 3, 5), (6, 7)]
        check(case)
        status = case.leader.status()
        assert (list(status.joining_ranks), status.num_regroups) == ([2], 1)
        assert "rank" in status.last_regroup_cause
        case.ranks.room.set()
        await until_whole(case, 3)
        check(case)
        assert [rank.holdings.experts[1] for _, rank in sorted(case.ranks.living.items())] == list(
            contiguous(8, 4).slots
        )
        assert case.ranks.num_cleared == 1, "only what might have been there before the start"
        assert [len(ranks) for ranks in case.ranks.sets] == [4, 1]


async def test_a_frozen_rank_is_fenced() -> None:
    async with leading(holding, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        frozen = case.ranks.living[1]
        frozen.faults |= dict.fromkeys(["status", "interrupt", "renew", "probe"])
        for number in (0, 2, 3):
            case.ranks.living[number].troubled.set()
        await until_whole(case, 3)
        assert case.ranks.fenced == [1]
        assert frozen.death.is_set()
        check(case)


@pytest.mark.parametrize(("owed_s", "fenced_after_s"), [(0.5, 1.5), (3.0, 0.5)])
def test_a_rank_that_had_owed_its_leader_an_answer_gets_less_time(owed_s: float, fenced_after_s: float) -> None:
    """That its peers miss it is no news then."""

    async def case() -> None:
        pace = Pace(renew_every_s=1.0)
        async with leading(holding, settings=FOUR, pace=pace, patience_s=1e4) as case:
            await case.until_state(EngineState.READY)
            clock = asyncio.get_running_loop()
            for rank in case.ranks.living.values():
                rank.calls.clear()
            frozen = case.ranks.living[1]
            frozen.frozen = True
            while "renew" not in frozen.calls:
                frozen.called.clear()
                await frozen.called.wait()
            await asyncio.sleep(owed_s)
            troubled_s = clock.time()
            case.ranks.living[0].troubled.set()
            await frozen.death.wait()
            assert clock.time() - troubled_s == pytest.approx(fenced_after_s, abs=0.01)
            await until_whole(case, 3)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(case())


async def test_what_is_left_of_a_group_goes_with_it() -> None:
    async with leading() as case:  # two groups of two
        await case.until_state(EngineState.READY)
        kill(case, 3)
        await until_whole(case, 3)
        assert sorted(case.ranks.fenced) == [2, 3]
        assert [len(ranks) for ranks in case.ranks.sets] == [4, 2]
        check(case)


@pytest.mark.parametrize("lost", [2, 3])
async def test_a_pipeline_goes_with_any_of_its_stages_and_comes_back(lost: int) -> None:
    """Each stage's experts are placed by what its own ranks hold."""
    async with leading(holding, settings=replace(SETTINGS, plan=ParallelPlan(data=2, pipeline=2))) as case:
        await case.until_state(EngineState.READY)
        first = case.ranks.sets[0][:2]
        case.ranks.room.clear()
        kill(case, lost)
        await case.until_state(EngineState.REGROUPING)
        await case.until_state(EngineState.READY)
        assert sorted(case.ranks.fenced) == [2, 3]
        assert [rank.holdings.layers for rank in first] == [(1,), (2,)]
        assert [rank.holdings.experts for rank in first] == [(tuple(range(8)),)] * 2
        check(case)
        case.ranks.room.set()
        await until_whole(case, 3)
        check(case)
        assert [len(ranks) for ranks in case.ranks.sets] == [4, 2]
        assert case.ranks.num_cleared == 1, "only what might have been there before the start"


async def test_two_at_once() -> None:
    async with leading(holding, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        kill(case, 0, 3)
        await until_whole(case, 3)
        check(case)
        assert case.ranks.num_cleared == 1


@pytest.mark.parametrize("call", ["interrupt", "regroup", "start"])
@pytest.mark.parametrize("dies", [True, False])
async def test_a_loss_during_a_regroup_is_another_regroup(call: str, dies: bool) -> None:
    async with leading(holding, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        second = case.ranks.living[1]
        if dies:
            second.faults[call] = RankLost("died just now")
            # It answers as the dead do from then on.
            original = second._called

            async def called(name: str) -> None:
                if name == call:
                    second.death.set()
                await original(name)

            second._called = called  # type: ignore[method-assign]
        else:
            second.faults[call] = None
        kill(case, 2)
        await case.until(lambda: case.leader.generation >= 3 and case.leader.state is EngineState.READY)
        if not dies:
            second.faults.clear()
        await until_whole(case, 3)
        check(case)


async def test_when_nothing_helps_all_ranks_start_again() -> None:
    def prepare(index: int, ranks: list[FakeRank]) -> None:
        holding(index, ranks)
        if not index:
            ranks[1].faults["regroup"] = RankLost("it cannot")

    async with leading(prepare, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        kill(case, 2)
        await case.until_state(EngineState.RESTARTING)
        assert "5 attempts to regroup failed" in case.leader.error
        await until_whole(case, 3)
        check(case)


async def test_nobody_is_left() -> None:
    async with leading(holding, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        kill(case, 0, 1, 2, 3)
        await case.until_state(EngineState.RESTARTING)
        await until_whole(case, 2)
        check(case)


async def test_without_memory_for_their_experts_the_lost_ones_are_waited_for() -> None:
    def prepare(index: int, ranks: list[FakeRank]) -> None:
        holding(index, ranks)
        if not index:
            ranks[0].faults["regroup"] = RankRefused("no memory for 2 more experts")

    async with leading(prepare, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        case.ranks.room.clear()
        kill(case, 2)
        await case.until(lambda: "fit nowhere" in case.leader.error)
        assert case.leader.groups() == ()
        assert "[2]" in case.leader.error
        renewed = case.ranks.living[1].calls.count("renew")
        give_up_s = time.monotonic() + 10
        while case.ranks.living[1].calls.count("renew") <= renewed:
            assert time.monotonic() < give_up_s, "they are kept alive"
            await asyncio.sleep(0.01)
        case.ranks.living[0].faults.clear()
        case.ranks.room.set()
        await until_whole(case, 2)
        check(case)
        assert case.ranks.num_cleared == 1


async def test_a_new_leader_finishes_what_another_began() -> None:
    """Some were interrupted, some had met for a generation that never began."""

    def orphans(ranks: object) -> list[FakeRank]:
        made = [FakeRank(number, FOUR.plan) for number in (0, 1, 3)]
        holding(0, made)
        for rank, generation, newest, state in zip(
            made,
            (5, 6, 5),
            (6, 6, 6),
            (RankState.INTERRUPTED, RankState.INTERRUPTED, RankState.RUNNING),
            strict=True,
        ):
            rank.generation, rank.newest, rank.state = generation, newest, state
        return made

    async with leading(holding, settings=FOUR, generation=5, orphans=orphans) as case:
        await until_whole(case, 7)
        check(case)
        assert case.ranks.num_cleared == 0
        assert [len(ranks) for ranks in case.ranks.sets] == [1]


@pytest.mark.parametrize("seed", range(12))
async def test_random_faults(seed: int) -> None:
    random = Random(seed)
    plan = random.choice([ParallelPlan(data=4), ParallelPlan(data=2, tensor=2), ParallelPlan(data=2, pipeline=2)])
    prepare = holding if plan.tensor == 1 else (lambda index, ranks: None)
    async with leading(prepare, settings=replace(SETTINGS, plan=plan)) as case:
        await until_whole(case, 1)
        for _ in range(4):
            generation = case.leader.generation
            for _ in range(random.randint(1, 2)):
                living = [number for number, rank in case.ranks.living.items() if not rank.death.is_set()]
                if not living:
                    break
                victim = random.choice(living)
                if random.random() < 0.3:
                    rank = case.ranks.living[victim]
                    rank.faults |= dict.fromkeys(random.sample(["status", "interrupt", "regroup", "renew"], 2))
                    rank.troubled.set()
                else:
                    kill(case, victim)
                for _ in range(random.randint(0, 30)):
                    await asyncio.sleep(0)
            # A rank that is only told to hang at a call that nobody makes is as good as a living one.
            for rank in case.ranks.living.values():
                rank.troubled.set()
            await case.until(lambda before=generation: case.leader.generation > before)  # type: ignore[misc]
            for rank in list(case.ranks.living.values()):
                rank.faults.clear()
            await until_whole(case, generation + 1)
            check(case)


async def test_of_ranks_that_cannot_reach_each_other_one_goes_and_comes_back_when_it_can() -> None:
    cut = {(1, 3)}
    tried_again = asyncio.Event()

    def prepare(index: int, ranks: list[FakeRank]) -> None:
        holding(index, ranks)
        if index > 1:
            tried_again.set()
        for rank in ranks:
            rank.cut_off = {a + b - rank.rank for a, b in cut if rank.rank in (a, b)} if index else set()

    async with leading(prepare, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        first = case.ranks.sets[0]
        first[1].cut_off, first[3].cut_off = {3}, {1}
        for number in (1, 3):
            first[number].troubled.set()
        await case.until(lambda: case.leader.state is EngineState.READY and len(case.leader.groups()) == 3)
        check(case)
        assert case.ranks.fenced == [3]
        await tried_again.wait()
        generation = case.leader.generation
        assert len(case.leader.groups()) == 3, "those that serve do not stop for what cannot reach them"
        first[1].cut_off.clear()
        cut.clear()
        await until_whole(case, generation + 1)
        check(case)
        assert case.ranks.num_cleared == 1


async def test_ranks_are_told_apart_before_their_steps_end() -> None:
    """Which they would not: each waits for what the other one sends."""
    async with leading(holding, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        (ranks,) = case.ranks.sets
        ranks[1].cut_off, ranks[3].cut_off = {3}, {1}
        for number in (1, 3):
            ranks[number].faults["interrupt"] = None
            ranks[number].troubled.set()
        await case.until(lambda: len(case.leader.groups()) == 3)
        ranks[1].faults.clear()  # as the step of a rank does whose peer has gone
        ranks[1].cut_off.clear()
        await until_whole(case, 2)
        assert case.ranks.fenced == [3]
        check(case)


async def test_who_has_come_in_stays_while_others_are_waited_for() -> None:
    """Memory suffices for three ranks' experts, not for two's: the first to come back is not thrown away."""
    rooms = {1: asyncio.Event(), 2: asyncio.Event()}

    def prepare(index: int, ranks: list[FakeRank]) -> None:
        holding(index, ranks)
        if not index:
            ranks[0].faults["regroup"] = RankRefused("no memory for 2 more experts")

    async with leading(prepare, settings=FOUR) as case:
        await case.until_state(EngineState.READY)
        replace_ranks = case.ranks.replace

        async def replacing(numbers: Sequence[int]) -> dict[int, Rank]:
            await rooms[numbers[0]].wait()
            return await replace_ranks(numbers)

        case.ranks.replace = replacing  # type: ignore[method-assign]
        kill(case, 1, 2)
        await case.until(lambda: "ranks [1, 2] fit nowhere" in case.leader.error)
        rooms[1].set()
        await case.until(lambda: "ranks [2] fit nowhere" in case.leader.error)
        newcomer = case.ranks.living[1]
        case.ranks.living[0].faults.clear()
        rooms[2].set()
        await until_whole(case, 2)
        check(case)
        assert case.ranks.living[1] is newcomer
        assert [len(ranks) for ranks in case.ranks.sets] == [4, 1, 1]
