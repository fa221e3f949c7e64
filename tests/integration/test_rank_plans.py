"""What plans are combined with, on ranks in processes of their own: overlapped steps, and caches that are too small."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import tiny_deepseek
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import Engine, StartEngine, engines, small_settings
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

PROMPTS = [[1, 5 + number, *range(40, 40 + 5 * number)] for number in range(12)]
NUM_TOKENS = 50
# Per token, layer and rank 40 numbers of 4 bytes; 14 blocks of 16 tokens hold a few sequences of up to 109 tokens.
SMALL_CACHE = 14 * 16 * 3 * 40 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[StartEngine]:
    def settings(*, overlap: bool, **plan: int) -> EngineSettings:
        made = small_settings(model, step_timeout_s=10.0, plan=ParallelPlan(**plan), overlap=overlap)
        return replace(made, cache_bytes=SMALL_CACHE, max_model_len=128)

    with engines(tmp_path, settings) as start_engine:
        yield start_engine


async def _generate(addresses: list[str]) -> list[list[int]]:
    """What every prompt gives, every other one sampled; the prompts are dealt out over the groups."""
    found: list[list[int]] = [[] for _ in PROMPTS]

    async def one_group(index: int) -> None:
        numbers = range(index, len(PROMPTS), len(addresses))
        async with FrontDoorStream(addresses[index]) as stream:
            for number in numbers:
                params = sampling(NUM_TOKENS, temperature=float(number % 2), seed=number)
                await stream.submit(number, PROMPTS[number], params)
            await stream.finish(*numbers, timeout_s=60)
            for number in numbers:
                found[number] = stream.tokens[number]

    await asyncio.gather(*(one_group(index) for index in range(len(addresses))))
    return found


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one rank with room for all says."""
    settings = small_settings(model, step_timeout_s=10.0, plan=ParallelPlan())
    single = Engine(tmp_path_factory.mktemp("single"), settings)
    try:
        return asyncio.run(_generate(single.start()))
    finally:
        single.end()


@pytest.mark.parametrize(
    ("plan", "overlap"),
    [({"data": 2, "tensor": 2}, True), ({"data": 2, "pipeline": 2}, False)],
    ids=["dp 2 x tp 2, overlapped", "dp 2 x pp 2"],
)
async def test_preempted_ones_go_on_as_if_nothing_had_been(
    start: StartEngine, expected: list[list[int]], plan: dict[str, int], overlap: bool
) -> None:
    engine = start(overlap=overlap, **plan)
    assert await _generate(engine.start()) == expected
    loads = [rank["load"] for rank in engine.on_all("status") if rank["load"] is not None]
    assert [load["num_preemptions"] > 0 for load in loads] == [True, True]
    assert all(load["num_free_blocks"] == load["num_blocks"] for load in loads)
    engine.stop()
