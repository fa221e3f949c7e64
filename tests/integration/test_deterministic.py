"""Deterministic engines: tokens and logprobs to the bit, alone, in company, and over two DP groups with half the
experts each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import tiny_deepseek
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import Engine
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

PROMPTS = [[1, 5 + number, *range(40, 40 + 17 * number)] for number in range(8)]
TOKENS = 16

# Per prompt: each token, its logprob, and those of the two likeliest.
Said = dict[int, list[tuple[int, float, tuple[float, ...]]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.end()


def _engine(engines: list[Engine], folder: Path, model: Path, *, data: int, **changes: Any) -> Engine:
    fields: dict[str, Any] = {
        "engine": "e0",
        "model_name": "tiny",
        "model_path": str(model),
        "plan": ParallelPlan(data=data),
        "dtype": "bfloat16",
        "device": "cpu",
        "deterministic": True,
        "max_model_len": 256,
        "cache_bytes": 1 << 22,
        "step_timeout_s": 10.0,
    }
    folder /= str(len(engines))
    folder.mkdir()
    engines.append(Engine(folder, EngineSettings(**(fields | changes))))
    return engines[-1]


async def _generate(address: str, numbers: Sequence[int], *, cached: bool = False) -> Said:
    """All at once, greedy and drawn by turns; `cached` if the longer ones' prefixes must come from the cache."""
    async with FrontDoorStream(address) as stream:
        for number in numbers:
            params = sampling(TOKENS, temperature=float(number % 2), seed=number, logprobs=2)
            await stream.submit(number, PROMPTS[number], params)
        await stream.finish(*numbers)
        said: Said = {}
        if cached:
            assert any(output.num_cached_tokens for message in stream.messages for output in message.outputs)
        for output in (output for message in stream.messages for output in message.outputs):
            said.setdefault(output.sequence_id, []).extend(
                (token_id, entry.logprob, tuple(entry.top_logprobs))
                for token_id, entry in zip(output.token_ids, output.logprobs, strict=True)
            )
    assert all(len(said[number]) == TOKENS for number in numbers)
    return said


async def test_the_same_bits(engines: list[Engine], model: Path, tmp_path: Path) -> None:
    single = _engine(engines, tmp_path, model, data=1)
    (address,) = single.start()
    expected: Said = {}
    for number in range(len(PROMPTS)):
        expected |= await _generate(address, [number])
    assert await _generate(address, range(len(PROMPTS)), cached=True) == expected
    single.stop()

    # Small steps, and a cache in which not all of them fit at once.
    spread = _engine(engines, tmp_path, model, data=2, max_batch_tokens=24, cache_bytes=1 << 17)
    groups = spread.start()
    deals = (range(0, 8, 2), range(1, 8, 2)), (range(1, 8), range(1)), (range(3), range(3, 8))
    for deal in deals:
        found = await asyncio.gather(*(_generate(*pair) for pair in zip(groups, deal, strict=True)))
        assert found[0] | found[1] == expected
    spread.stop()
