"""A leader over rank processes, which die and freeze at the awkward moments: it serves in the end, and every stream of
a load that goes on meanwhile is the undisturbed one, bit for bit."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.engine.leader import Leader, Pace
from cluster.engine.states import EngineState
from protos.shoal.v1 import session_pb2
from tests.checkpoints import tiny_deepseek, tiny_llama
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.led_ranks import ProcessRank, ProcessRanks
from tests.integration.rank_process import small_settings
from workers.parallel.groups import host_store
from workers.parallel.plan import ParallelPlan
from workers.settings import ExpertBalance

pytestmark = pytest.mark.timeout(240)

PROMPTS = [[1, 5 + number, *range(40, 40 + 7 * number)] for number in range(6)]
NUM_TOKENS = 200


class Case:
    """The leader, its ranks, and what changes in them."""

    def __init__(self, leader: Leader, ranks: ProcessRanks) -> None:
        self.leader = leader
        self.ranks = ranks
        self.changed = asyncio.Condition()
        self.generations: list[int] = []

    async def note(self) -> None:
        async with self.changed:
            self.generations.append(self.leader.generation)
            self.changed.notify_all()

    async def until(self, holds: Callable[[], bool], timeout_s: float = 100.0) -> None:
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(holds)

    async def until_whole(self, behind: int = 0) -> None:
        size = self.leader._settings.plan.data
        await self.until(
            lambda: (
                self.leader.state is EngineState.READY
                and self.leader.generation > behind
                and len(self.leader.groups()) == size
            )
        )

    async def answers(self) -> list[list[int]]:
        """Every prompt's tokens, whatever happens meanwhile: what a group loses is asked of another one."""
        return list(await asyncio.gather(*(self._answer(number) for number in range(len(PROMPTS)))))

    async def _answer(self, number: int) -> list[int]:
        tokens: list[int] = []
        params = sampling(NUM_TOKENS, temperature=float(number % 2), seed=number)
        while True:
            await self.until(lambda: bool(self.leader.groups()))
            groups = self.leader.groups()
            group = groups[number % len(groups)]
            try:
                async with FrontDoorStream(f"{group.host}:{group.port}") as stream:
                    await stream.submit(number, PROMPTS[number], params, output_token_ids=tokens)
                    while not (stream.ended or number in stream.finishes):
                        if group.key not in {one.key for one in self.leader.groups()}:
                            break  # given up by the leader, though a frozen process keeps its connections
                        await asyncio.sleep(0.05)
                    tokens = list(stream.tokens[number])
                    if stream.finishes.get(number) == session_pb2.FINISH_LENGTH:
                        return tokens
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter of a call that ended before
                await asyncio.sleep(0.05)  # it has gone, and the leader has not heard of it yet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def leading(folder: Path, model: Path, plan: ParallelPlan, **fields: Any) -> AsyncIterator[Case]:
    settings = small_settings(model, step_timeout_s=2.0, plan=plan, deterministic=True, **fields)
    ranks = ProcessRanks(folder, settings)
    loop = asyncio.get_running_loop()
    notes: set[asyncio.Task[None]] = set()

    def note() -> None:
        task = loop.create_task(case.note())
        notes.add(task)
        task.add_done_callback(notes.discard)

    pace = Pace(first_backoff_s=0.1, call_timeout_s=10.0)
    leader = Leader(settings, ranks, host_store, note, pace=pace)
    case = Case(leader, ranks)
    running = asyncio.create_task(leader.run())
    try:
        yield case
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await ranks.clear()
        assert case.generations == sorted(case.generations), "a generation never falls"


def at(ranks: ProcessRanks, number: int, method: str, act: Callable[[], None]) -> asyncio.Event:
    """Does it once, just before the leader asks that of the rank."""
    done = asyncio.Event()

    def before(rank: ProcessRank, asked: str) -> None:
        if not done.is_set() and (rank.number, asked) == (number, method):
            done.set()
            act()

    ranks.before = before
    return done


async def test_faults_at_the_awkward_moments(model: Path, tmp_path: Path) -> None:
    async with leading(tmp_path, model, ParallelPlan(data=3)) as case:
        leader, ranks = case.leader, case.ranks
        loading = at(ranks, 1, "load", lambda: ranks.kill(1))
        await case.until_whole(1)
        assert loading.is_set()
        assert ranks.num_sets == 2, "without ranks to go on with, all start again"
        expected = await case.answers()

        for number, method, how in (
            (0, "regroup", signal.SIGKILL),  # during the regroup itself: two are lost, one goes on
            (1, "interrupt", signal.SIGSTOP),  # frozen in it
            (2, "load", signal.SIGKILL),  # the one that comes back is lost again on its way
            (2, "start", signal.SIGKILL),  # the one that comes back, at the last moment
        ):
            generation = leader.generation
            hit = at(ranks, number, method, lambda number=number, how=how: ranks.kill(number, how))  # type: ignore[misc]
            running = asyncio.create_task(case.answers())
            ranks.kill(2)
            assert await running == expected, (number, method)
            await case.until_whole(generation + 1)
            assert hit.is_set()
        generation = leader.generation
        running = asyncio.create_task(case.answers())
        ranks.kill(0)
        ranks.kill(1)
        assert await running == expected, "two at once"
        await case.until_whole(generation + 1)
        assert ranks.num_sets == 2, "nobody started all ranks again"


async def test_faults_of_a_pipeline_whose_experts_move(model: Path, tmp_path: Path) -> None:
    """Ranks of any stage are lost, in the midst of a move and on their way back; the other group goes on with what it
    holds, steps in flight among it."""
    balance = ExpertBalance(interval_s=0.3, threshold=1.0)
    async with leading(tmp_path, model, ParallelPlan(data=2, pipeline=2), expert_balance=balance) as case:
        leader, ranks = case.leader, case.ranks
        await case.until_whole()
        survivors = [ranks.living[number] for number in (0, 1)]
        answers = []
        # What serves first, and what comes back, holds what fell to it: experts move as soon as there are tokens.
        for number, method, how in ((2, "switch_experts", signal.SIGKILL), (3, "stage_experts", signal.SIGSTOP)):
            generation = leader.generation
            hit = at(ranks, number, method, lambda number=number, how=how: ranks.kill(number, how))  # type: ignore[misc]
            while not hit.is_set():
                answers.append(await case.answers())
            await case.until_whole(generation + 1)
        answers.append(await case.answers())
        assert len(answers) >= 3
        assert all(one == answers[-1] for one in answers), "disturbed or not"
        assert [ranks.living[number] for number in (0, 1)] == survivors
        assert ranks.num_sets == 1, "nobody started all ranks again"


async def test_a_rank_of_a_dense_pipeline_dies(tmp_path: Path) -> None:
    """Without experts the groups share nothing; the other one goes on, and its ranks are the same in the end."""
    async with leading(tmp_path, tiny_llama(tmp_path / "dense"), ParallelPlan(data=2, pipeline=2)) as case:
        leader, ranks = case.leader, case.ranks
        await case.until_whole()
        survivors = [ranks.living[number] for number in (0, 1)]
        expected, generation = await case.answers(), leader.generation
        running = asyncio.create_task(case.answers())
        ranks.kill(3)
        assert await running == expected
        await case.until_whole(generation + 1)
        assert await case.answers() == expected
        assert [ranks.living[number] for number in (0, 1)] == survivors


async def test_faults_while_experts_move(model: Path, tmp_path: Path) -> None:
    """With a rank that takes part, as it reads what it is to hold or as all change over at once."""
    balance = ExpertBalance(interval_s=0.3, threshold=1.0)
    async with leading(tmp_path, model, ParallelPlan(data=3), expert_balance=balance) as case:
        leader, ranks = case.leader, case.ranks
        await case.until_whole()
        expected, num_sets = await case.answers(), ranks.num_sets
        for number, method, victim, how in (
            (1, "stage_experts", 1, signal.SIGKILL),
            (0, "switch_experts", 2, signal.SIGKILL),  # some are asked already, some are not
            (2, "switch_experts", 0, signal.SIGKILL),
            (1, "switch_experts", 1, signal.SIGSTOP),
        ):
            generation = leader.generation
            hit = at(ranks, number, method, lambda victim=victim, how=how: ranks.kill(victim, how))  # type: ignore[misc]
            while not hit.is_set():  # whether experts move is for what the tokens choose to say
                assert await case.answers() == expected, (number, method)
            assert await case.answers() == expected, "what follows, too"
            await case.until_whole(generation)
        moved = at(ranks, 2, "switch_experts", lambda: None)
        while not moved.is_set():
            assert await case.answers() == expected, "experts still move"
        assert ranks.num_sets == num_sets, "nobody started all ranks again"
