"""Experts spread over DP groups in processes of their own: the same tokens as one rank, and deaths that are noticed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protos.shoal.v1 import session_pb2
from tests.checkpoints import tiny_deepseek
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import Engine
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

STEP_TIMEOUT_S = 2.0
PROMPTS = [[1, 5 + number, *range(40, 40 + 7 * number)] for number in range(8)]

StartEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[StartEngine]:
    engines: list[Engine] = []

    def start_engine(**plan: int) -> Engine:
        fields: dict[str, Any] = {
            "engine": "e0",
            "model_name": "tiny",
            "model_path": str(model),
            "plan": ParallelPlan(**plan),
            "dtype": "float32",
            "device": "cpu",
            "max_model_len": 512,
            "max_batch_tokens": 64,
            "cache_bytes": 1 << 22,
            "step_timeout_s": STEP_TIMEOUT_S,
        }
        folder = tmp_path / str(len(engines))
        folder.mkdir()
        engines.append(Engine(folder, EngineSettings(**fields)))
        return engines[-1]

    yield start_engine
    for engine in engines:
        engine.end()


async def _generate(addresses: list[str]) -> list[list[int]]:
    """Sixteen tokens for each prompt, the prompts dealt out over the groups, greedy and drawn by turns."""

    async def one_group(index: int) -> dict[int, list[int]]:
        numbers = range(index, len(PROMPTS), len(addresses))
        async with FrontDoorStream(addresses[index]) as stream:
            for number in numbers:
                await stream.submit(number, PROMPTS[number], sampling(16, temperature=float(number % 2), seed=number))
            await stream.finish(*numbers)
            return stream.tokens

    tokens: dict[int, list[int]] = {}
    for found in await asyncio.gather(*(one_group(index) for index in range(len(addresses)))):
        tokens |= found
    return [tokens[number] for number in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "plan",
    [{"data": 2}, {"data": 4, "redundant_experts": 4}, {"data": 2, "tensor": 2}],
    ids=["dp 2", "dp 4 with redundant experts", "dp 2 tp 2"],
)
async def test_spread_experts_say_what_one_rank_says(start: StartEngine, plan: dict[str, int]) -> None:
    single = start()
    expected = await _generate(single.start())
    single.stop()
    spread = start(**plan)
    addresses = spread.start()
    assert len(addresses) == plan["data"]
    # A group alone at work, its companions only serving their experts, and then all of them.
    async with FrontDoorStream(addresses[-1]) as stream:
        await stream.submit(0, PROMPTS[0], sampling(16, temperature=0.0, seed=0))
        await stream.finish(0)
        assert stream.tokens[0] == expected[0]
    assert await _generate(addresses) == expected
    spread.stop()


async def test_an_idle_engine_does_nothing(start: StartEngine) -> None:
    engine = start(data=2)
    addresses = engine.start()
    await _generate(addresses)

    def busy_s() -> float:
        total = 0.0
        for rank in engine.ranks:
            fields = Path(f"/proc/{rank.process.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total

    before = busy_s()
    await asyncio.sleep(2)  # the claim is about time that passes
    assert (busy_s() - before) / 2 / 2 < 0.02


async def test_a_death_in_one_group_is_noticed_in_the_other(start: StartEngine) -> None:
    engine = start(data=2)
    addresses = engine.start()
    async with FrontDoorStream(addresses[0]) as stream:
        await stream.submit(1, PROMPTS[1], sampling(400))
        await stream.until(lambda: len(stream.tokens.get(1, ())) >= 3)
        engine.ranks[1].process.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        await stream.finish(1)
        assert stream.finishes[1] == session_pb2.FINISH_FAILED
        assert time.monotonic() - killed_s < STEP_TIMEOUT_S
    assert engine.ranks[0].call("status")["state"] == "broken"
