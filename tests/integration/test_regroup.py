"""Ranks in processes of their own that are killed and frozen under load: the others go on, bit for bit."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from protos.shoal.v1 import session_pb2
from tests.checkpoints import tiny_deepseek
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import Engine, StartEngine, engines, small_settings
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

STEP_TIMEOUT_S = 20.0  # on a busy machine no rank may be taken for one that hangs
HANG_S = 3.0
NUM_TOKENS = 150
PROMPTS = [[1, 5 + number, *range(40, 40 + 7 * number)] for number in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[StartEngine]:
    def settings(step_timeout_s: float = STEP_TIMEOUT_S, **plan: int) -> EngineSettings:
        return small_settings(model, step_timeout_s=step_timeout_s, plan=ParallelPlan(**plan), deterministic=True)

    with engines(tmp_path, settings) as start_engine:
        yield start_engine


class Client:
    """A front door in small: prompts dealt out over the groups, and replayed on another group where one is lost."""

    def __init__(self, addresses: Sequence[str], num_tokens: int = NUM_TOKENS) -> None:
        self._addresses = list(addresses)
        self._num_tokens = num_tokens
        self.tokens: list[list[int]] = [[] for _ in PROMPTS]
        self.began = asyncio.Event()

    async def run(self) -> list[list[int]]:
        parts = [range(index, len(PROMPTS), len(self._addresses)) for index in range(len(self._addresses))]
        await asyncio.gather(
            *(self._serve(address, part) for address, part in zip(self._addresses, parts, strict=True))
        )
        return self.tokens

    async def _serve(self, address: str, numbers: Sequence[int]) -> None:
        async with FrontDoorStream(address) as stream:
            for number in numbers:
                params = sampling(self._num_tokens, temperature=float(number % 2), seed=number)
                await stream.submit(number, PROMPTS[number], params, output_token_ids=self.tokens[number])
            before = {number: list(self.tokens[number]) for number in numbers}
            for number in numbers:
                stream.tokens[number] = list(before[number])
            await stream.until(lambda: all(len(stream.tokens[n]) > len(before[n]) for n in numbers) or _over(stream))
            self.began.set()
            await stream.until(lambda: _over(stream) or all(n in stream.finishes for n in numbers), timeout_s=60)
            for number in numbers:
                self.tokens[number] = stream.tokens[number]
        left = [number for number in numbers if stream.finishes.get(number) != session_pb2.FINISH_LENGTH]
        if left:
            await self._serve(self._addresses[0], left)


def _over(stream: FrontDoorStream) -> bool:
    return stream.ended is not None


async def _wait_for_trouble(engine: Engine, numbers: Sequence[int], timeout_s: float) -> list[str]:
    return await asyncio.to_thread(engine.on_all, "trouble", engine.generation, timeout_s, numbers=numbers)


@pytest.mark.parametrize(
    "plan", [{"data": 4}, {"data": 4, "redundant_experts": 4}], ids=["dp 4", "dp 4 with redundant experts"]
)
async def test_a_killed_rank_is_replaced_by_the_others_and_comes_back(start: StartEngine, plan: dict[str, int]) -> None:
    engine = start(**plan)
    addresses = engine.start()
    expected = await Client(addresses).run()

    client = Client(addresses)
    running = asyncio.create_task(client.run())
    await client.began.wait()
    engine.ranks[3].process.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    reasons = await _wait_for_trouble(engine, [0, 1, 2], 60.0)
    assert all(reasons)
    assert time.monotonic() - killed_s < STEP_TIMEOUT_S, "noticed by the closed connection, not by silence"
    sessions = await asyncio.to_thread(engine.regroup, [0, 1, 2])
    assert list(sessions.values()) == addresses[:3], "the streams stay where they are"
    assert time.monotonic() - killed_s < STEP_TIMEOUT_S
    await asyncio.to_thread(engine.replace, 3)
    sessions = await asyncio.to_thread(engine.regroup, [0, 1, 2, 3])
    assert await _wait_for_trouble(engine, [0, 1, 2, 3], 0.2) == [""] * 4, "the one that came back forgets its start"
    assert await running == expected
    status = engine.on_all("status")
    assert [rank["generation"] for rank in status] == [engine.generation] * 4
    assert await Client(list(sessions.values())).run() == expected
    if not plan.get("redundant_experts"):
        slots = engine.ranks[0].call("expert_loads")["slots"]
        assert slots == [[[0, 4], [1, 5], [2, 6], [3, 7]]] * 2, "every expert is back where it began"
    engine.stop()


async def test_a_frozen_rank_is_noticed_by_its_silence_and_the_others_go_on(start: StartEngine) -> None:
    engine = start(data=4, step_timeout_s=HANG_S)
    addresses = engine.start()
    expected = await Client(addresses).run()
    client = Client(addresses)
    running = asyncio.create_task(client.run())
    await client.began.wait()
    os.kill(engine.ranks[2].process.pid, signal.SIGSTOP)
    frozen_s = time.monotonic()
    reasons = await _wait_for_trouble(engine, [0, 1, 3], 60.0)
    assert all(reasons)
    assert HANG_S / 2 < time.monotonic() - frozen_s < STEP_TIMEOUT_S
    engine.ranks[2].process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(engine.regroup, [0, 1, 3])
    assert await running == expected
    engine.on_all("stop", numbers=[0, 1, 3])


async def test_one_group_is_left_of_all(start: StartEngine) -> None:
    engine = start(data=3)
    addresses = engine.start()
    expected = await Client(addresses).run()
    client = Client(addresses)
    running = asyncio.create_task(client.run())
    await client.began.wait()
    for lost in (1, 2):
        engine.ranks[lost].process.send_signal(signal.SIGKILL)
    await _wait_for_trouble(engine, [0], 60.0)
    await asyncio.to_thread(engine.regroup, [0])
    assert await running == expected
    with pytest.raises(RuntimeError, match="Outdated"):
        engine.ranks[0].call("interrupt", engine.generation, 1.0)
    engine.on_all("stop", numbers=[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_group_of_two_goes_with_its_follower_and_the_other_group_goes_on(
    start: StartEngine, how: signal.Signals
) -> None:
    engine = start(data=2, tensor=2, step_timeout_s=HANG_S if how is signal.SIGSTOP else STEP_TIMEOUT_S)
    addresses = engine.start()
    expected = await Client(addresses).run()
    client = Client(addresses)
    running = asyncio.create_task(client.run())
    await client.began.wait()
    engine.ranks[3].process.send_signal(how)
    hit_s = time.monotonic()
    assert all(await _wait_for_trouble(engine, [2], 60.0))
    assert time.monotonic() - hit_s < STEP_TIMEOUT_S, "a follower's silence counts as a first rank's does"
    for number in (2, 3):  # as the leader does with what is left of a group
        engine.ranks[number].process.send_signal(signal.SIGKILL)
    assert all(await _wait_for_trouble(engine, [0, 1], 60.0))
    await asyncio.to_thread(engine.regroup, [0, 1])
    assert await running == expected
    engine.on_all("stop", numbers=[0, 1])


async def test_a_pipeline_goes_with_its_last_stage_and_the_other_one_goes_on(start: StartEngine) -> None:
    """With steps in flight, which are begun again; the lost group comes back with all its stages."""
    engine = start(data=2, pipeline=2, redundant_experts=2)
    addresses = engine.start()
    expected = await Client(addresses).run()
    client = Client(addresses)
    running = asyncio.create_task(client.run())
    await client.began.wait()
    engine.ranks[3].process.send_signal(signal.SIGKILL)
    assert all(await _wait_for_trouble(engine, [0, 1, 2], 10.0))
    engine.ranks[2].process.send_signal(signal.SIGKILL)  # as the leader does with what is left of a group
    sessions = await asyncio.to_thread(engine.regroup, [0, 1])
    assert list(sessions.values()) == addresses[:1], "the streams stay where they are"
    assert {rank["generation"] for rank in engine.on_all("status", numbers=[0, 1])} == {2}
    await asyncio.to_thread(engine.replace, 1)
    await asyncio.to_thread(engine.regroup, [0, 1, 2, 3])
    assert await _wait_for_trouble(engine, [0, 1, 2, 3], 0.2) == [""] * 4
    assert await running == expected
    held = [rank["experts"] for rank in engine.on_all("interrupt", engine.generation + 1, 5.0)]
    for stage in (0, 1):
        assert {expert for (experts,) in held[stage::2] for expert in experts} == set(range(8))
    engine.on_all("stop")


async def test_an_idle_group_of_two_notices_a_frozen_rank(start: StartEngine) -> None:
    """No step waits for it, and no other group's beat."""
    engine = start(tensor=2, step_timeout_s=HANG_S)
    engine.start()
    engine.ranks[0].process.send_signal(signal.SIGSTOP)
    assert all(await _wait_for_trouble(engine, [1], STEP_TIMEOUT_S))
    assert engine.ranks[1].call("status")["state"] == "broken"
