"""Layers spread over stages in processes of their own: the same tokens as one rank, and deaths that are noticed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from protos.shoal.v1 import inference_pb2, session_pb2
from scheduler.experts import balanced
from scheduler.experts_replay import compare, read_recording
from tests.checkpoints import tiny_deepseek
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import Engine, StartEngine, engines, expect_idle, small_settings
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

STEP_TIMEOUT_S = 20.0  # on a busy machine no rank may be taken for one that hangs
HANG_S = 2.0
LONG = 4000  # tokens of a stream that is cut off, however late its reader gets its turn
PROMPTS = [[1, 5 + number, *range(40, 40 + 7 * number)] for number in range(9)]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3},
    {"logprobs": 2},
    {"prompt_logprobs": 1, "temperature": 1.0},
    {"frequency_penalty": 0.5, "logit_bias": {7: 2.0}},
    {"min_tokens": 12, "ignore_eos": False},
    {"top_k": 5, "temperature": 1.5},
    {"guided": inference_pb2.GuidedDecoding(regex="([a-z]{3,9} ){9}"), "temperature": 1.0, "logprobs": 0},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


def _settings(
    model: Path, step_timeout_s: float = STEP_TIMEOUT_S, *, deterministic: bool = False, **plan: int
) -> EngineSettings:
    return small_settings(
        model,
        step_timeout_s=step_timeout_s,
        plan=ParallelPlan(**plan),
        max_model_len=4096,
        deterministic=deterministic,
    )


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[StartEngine]:
    with engines(tmp_path, partial(_settings, model)) as start_engine:
        yield start_engine


async def _generate(addresses: list[str], num_tokens: int = 16) -> dict[int, list[Any]]:
    """What every prompt gives, each sampled in another way; the prompts are dealt out over the groups."""
    found: dict[int, list[Any]] = {}

    async def one_group(index: int) -> None:
        numbers = range(index, len(PROMPTS), len(addresses))
        async with FrontDoorStream(addresses[index]) as stream:
            for number in numbers:
                params = sampling(num_tokens, seed=number, **EXTRAS[number])
                await stream.submit(number, PROMPTS[number], params, eos_token_ids=[2])
            await stream.finish(*numbers)
            for number in numbers:
                found[number] = [stream.tokens[number], _told(stream, number)]

    await asyncio.gather(*(one_group(index) for index in range(len(addresses))))
    return found


def _told(stream: FrontDoorStream, number: int) -> list[tuple[int, float]]:
    """Logprobs of output and prompt, to a few digits."""
    outputs = [output for message in stream.messages for output in message.outputs if output.sequence_id == number]
    entries = [entry for output in outputs for entry in (*output.logprobs, *output.prompt_logprobs)]
    return [(entry.token_id, round(entry.logprob, 3)) for entry in entries]


def _compare(found: dict[int, list[Any]], expected: dict[int, list[Any]]) -> None:
    for number, (tokens, told) in expected.items():
        assert found[number][0] == tokens, number
        assert [token for token, _ in found[number][1]] == [token for token, _ in told]
        assert all(abs(a - b) < 0.01 for (_, a), (_, b) in zip(found[number][1], told, strict=True))


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """What one rank says."""
    single = Engine(tmp_path_factory.mktemp("single"), _settings(model))
    try:
        return asyncio.run(_generate(single.start()))
    finally:
        single.end()


@pytest.mark.parametrize(
    "plan",
    [{"pipeline": 3}, {"pipeline": 2, "tensor": 2}, {"data": 2, "pipeline": 2, "redundant_experts": 2}],
    ids=["pp 3", "pp 2 tp 2", "dp 2 pp 2 with redundant experts"],
)
async def test_stages_say_what_one_rank_says(
    start: StartEngine, model: Path, expected: dict[int, list[Any]], plan: dict[str, int]
) -> None:
    engine = start(**plan)
    addresses = engine.start()
    assert len(addresses) == plan.get("data", 1)
    held = [rank["weight_bytes"] for rank in engine.on_all("status")]
    assert max(held) < 0.8 * (model / "model.safetensors").stat().st_size, "every rank holds its layers only"
    # A group alone at work, and then all of them.
    async with FrontDoorStream(addresses[-1]) as stream:
        await stream.submit(0, PROMPTS[0], sampling(16, seed=0))
        await stream.finish(0)
        assert stream.tokens[0] == expected[0][0]
    _compare(await _generate(addresses), expected)
    assert 0 < engine.ranks[0].call("probe", 10) < 10
    assert "stages over gloo" in engine.ranks[-1].call("status")["collectives"]
    await expect_idle(engine)
    engine.stop()
    assert {rank["reason"] for rank in engine.on_all("status")} <= {"", "stopped"}


async def test_experts_of_every_stage_move_and_are_recorded_while_tokens_stream(
    start: StartEngine, tmp_path: Path
) -> None:
    """With steps in flight, without another bit: each stage's ranks change over between the same two steps."""
    engine = start(deterministic=True, data=2, pipeline=2, redundant_experts=2)
    addresses = engine.start()
    engine.on_all("record_routing", str(tmp_path / "routing"))
    expected = await _generate(addresses, 60)
    stages = [[0, 2], [1, 3]]
    layers = [engine.ranks[ranks[0]].call("expert_loads")["layers"] for ranks in stages]
    assert layers == [[1], [2]], "each stage has experts of its own"
    random = Random(7)
    busy = asyncio.create_task(_generate(addresses, 60))
    places: dict[int, Any] = {}
    epoch = num_under_way = 0
    while not busy.done() or epoch < 4:
        epoch += 1
        moved = [layer for stage in layers for layer in stage if random.random() < 0.7]
        wanted = {layer: _shuffled(random) for layer in moved}
        await asyncio.gather(
            *(
                asyncio.to_thread(
                    engine.on_all,
                    "stage_experts",
                    epoch,
                    [(layer, slots) for layer, slots in wanted.items() if layer in layers[stage]],
                    numbers=ranks,
                )
                for stage, ranks in enumerate(stages)
            )
        )
        await asyncio.to_thread(engine.on_all, "switch_experts", epoch, 10.0)
        num_under_way += not busy.done()
        places |= wanted
    assert num_under_way >= 2
    assert await busy == expected
    engine.on_all("record_routing", None)
    recording = read_recording(tmp_path / "routing")
    for stage, (ranks, recorded) in enumerate(zip(stages, recording.stages, strict=True)):
        loads = [engine.ranks[rank].call("expert_loads") for rank in ranks]
        assert [found["epoch"] for found in loads] == [epoch] * 2
        assert all(found["slots"] == [places[layer] for layer in layers[stage]] for found in loads)
        assert list(recorded.layers) == layers[stage]
        assert np.array_equal(np.sum(recorded.parts, axis=0), np.sum([found["counts"] for found in loads], axis=0))
    contiguous, known, bound = compare(recording, 2)
    assert bound.imbalance <= min(contiguous.imbalance, known.imbalance) + 0.01
    with pytest.raises(RuntimeError, match="layer 2 has no routed experts"):
        engine.ranks[0].call("stage_experts", epoch + 1, [(2, places[2])])
    engine.stop()


def _shuffled(random: Random) -> list[list[int]]:
    """Anywhere, with up to two redundant experts."""
    slots = balanced([random.expovariate(1.0) for _ in range(8)], 2, redundant=random.choice((0, 2))).slots
    return [random.sample(held, len(held)) for held in random.sample(slots, 2)]


@pytest.mark.parametrize(
    ("lost", "how"), [(1, signal.SIGSTOP), (2, signal.SIGKILL)], ids=["the middle one hangs", "the last one is killed"]
)
async def test_a_lost_stage_fails_what_is_open_in_time(start: StartEngine, lost: int, how: signal.Signals) -> None:
    engine = start(pipeline=3, step_timeout_s=HANG_S if how is signal.SIGSTOP else STEP_TIMEOUT_S)
    (address,) = engine.start()
    async with FrontDoorStream(address) as stream:
        for number in range(4):
            await stream.submit(number, PROMPTS[number], sampling(LONG))
        await stream.until(lambda: all(stream.tokens.get(number) for number in range(4)))
        os.kill(engine.ranks[lost].process.pid, how)
        killed_s = time.monotonic()
        await stream.finish(*range(4))
        assert time.monotonic() - killed_s < STEP_TIMEOUT_S, "a crash is no silence, and a silence ends soon"
        assert set(stream.finishes.values()) == {session_pb2.FINISH_FAILED}
        await stream.until(lambda: stream.ended is not None)
    status = engine.ranks[0].call("status")
    assert status["state"] == "broken"
    assert status["reason"]


async def test_a_lost_first_stage_frees_the_others(start: StartEngine) -> None:
    engine = start(pipeline=2)
    (address,) = engine.start()
    first, last = engine.ranks
    async with FrontDoorStream(address) as stream:
        await stream.submit(1, PROMPTS[1], sampling(LONG))
        await stream.until(lambda: bool(stream.tokens.get(1)))
        first.process.kill()
        killed_s = time.monotonic()
        while last.call("status")["state"] != "broken":
            assert time.monotonic() - killed_s < STEP_TIMEOUT_S
            await asyncio.sleep(0.02)
    last.call("stop")
