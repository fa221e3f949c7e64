"""Experts spread over DP groups in processes of their own: the same tokens as one rank, and deaths that are noticed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from scheduler.experts import balanced
from scheduler.experts_replay import compare, read_recording
from tests.checkpoints import tiny_deepseek
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import StartEngine, engines, expect_idle, small_settings
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

# Nobody hangs here: on a busy machine no rank may be taken for one that does.
STEP_TIMEOUT_S = 20.0
NUM_EXPERTS = 8
EXPERT_LAYERS = [1, 2]
LONG = 4000  # tokens of a stream that is cut off, however late its reader gets its turn
PROMPTS = [[1, 5 + number, *range(40, 40 + 7 * number)] for number in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[StartEngine]:
    def settings(collectives: str = "auto", overlap: bool = False, **plan: int) -> EngineSettings:
        return small_settings(
            model,
            step_timeout_s=STEP_TIMEOUT_S,
            plan=ParallelPlan(**plan),
            max_model_len=4096,
            collectives=collectives,
            overlap=overlap,
        )

    with engines(tmp_path, settings) as start_engine:
        yield start_engine


async def _generate(addresses: list[str], num_tokens: int = 16) -> list[list[int]]:
    """That many tokens for each prompt, the prompts dealt out over the groups, greedy and drawn by turns."""

    async def one_group(index: int) -> dict[int, list[int]]:
        numbers = range(index, len(PROMPTS), len(addresses))
        async with FrontDoorStream(addresses[index]) as stream:
            for number in numbers:
                params = sampling(num_tokens, temperature=float(number % 2), seed=number)
                await stream.submit(number, PROMPTS[number], params)
            await stream.finish(*numbers)
            return stream.tokens

    tokens: dict[int, list[int]] = {}
    for found in await asyncio.gather(*(one_group(index) for index in range(len(addresses)))):
        tokens |= found
    return [tokens[number] for number in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "plan",
    [{"data": 2}, {"data": 4, "redundant_experts": 4}, {"data": 2, "tensor": 2}, {"data": 2, "overlap": True}],
    ids=["dp 2", "dp 4 with redundant experts", "dp 2 tp 2", "dp 2, steps overlapped"],
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


def _random_placements(random: Random, num_ranks: int) -> list[tuple[int, tuple[tuple[int, ...], ...]]]:
    """For one or both layers with experts, each with redundant ones of its own."""
    found = []
    for layer in random.sample(EXPERT_LAYERS, random.choice((1, 2))):
        loads = [random.expovariate(1.0) for _ in range(NUM_EXPERTS)]
        placement = balanced(loads, num_ranks, redundant=random.choice((0, 4, 8)))
        slots = list(placement.slots)
        random.shuffle(slots)
        found.append((layer, tuple(tuple(random.sample(held, len(held))) for held in slots)))
    return found


@pytest.mark.parametrize(
    "plan",
    [{"data": 2, "redundant_experts": 2}, {"data": 4}, {"data": 2, "tensor": 2}],
    ids=["dp 2", "dp 4", "dp 2 tp 2"],
)
async def test_experts_move_while_tokens_stream(start: StartEngine, plan: dict[str, int]) -> None:
    engine = start(**plan)
    addresses = engine.start()
    expected = await _generate(addresses, 120)
    counted = engine.ranks[0].call("expert_loads")
    assert sum(counted["counts"][0]) > 0
    assert counted["layers"] == EXPERT_LAYERS
    random = Random(7)
    busy = asyncio.create_task(_generate(addresses, 120))
    epoch = num_under_way = 0
    placements: dict[int, Any] = dict(zip(counted["layers"], counted["slots"], strict=True))
    while not busy.done() or epoch < 3:
        epoch += 1
        wanted = _random_placements(random, len(engine.ranks))
        await asyncio.to_thread(engine.on_all, "stage_experts", epoch, wanted)
        assert engine.ranks[-1].call("expert_loads")["epoch"] == epoch - 1
        await asyncio.to_thread(engine.on_all, "switch_experts", epoch, 30.0)
        num_under_way += not busy.done()
        placements |= {layer: [list(held) for held in slots] for layer, slots in wanted}
    assert num_under_way >= 2
    assert await busy == expected
    assert await _generate(addresses, 120) == expected
    for rank in engine.ranks:
        loads = rank.call("expert_loads")
        assert loads["epoch"] == epoch
        assert loads["slots"] == [placements[layer] for layer in EXPERT_LAYERS]
    engine.stop()


async def test_a_process_group_gives_what_memory_gives(start: StartEngine) -> None:
    """The same bits, whatever carries the rows: drawn tokens would tell."""
    found = []
    for collectives, kind in (("auto", "shared memory"), ("gloo", "gloo")):
        engine = start(data=2, collectives=collectives)
        found.append(await _generate(engine.start(), 64))
        assert {rank.call("status")["dispatch"] for rank in engine.ranks} == {f"all-to-all over {kind}"}
        engine.stop()
    assert found[0] == found[1]


async def test_experts_do_not_move_before_all_ranks_are_ready(start: StartEngine) -> None:
    engine = start(data=2)
    addresses = engine.start()
    expected = await _generate(addresses)
    layer, slots = 1, [[0, 2, 4, 6], [1, 3, 5, 7]]
    engine.on_all("stage_experts", 1, [(layer, slots)])
    with pytest.raises(RuntimeError, match="did not agree"):
        await asyncio.to_thread(engine.ranks[0].call, "switch_experts", 1, 0.2)
    assert await _generate(addresses) == expected
    assert [rank.call("expert_loads")["epoch"] for rank in engine.ranks] == [0, 0]
    engine.on_all("switch_experts", 1, 30.0)
    assert [rank.call("expert_loads")["slots"][0] for rank in engine.ranks] == [slots, slots]
    assert await _generate(addresses) == expected
    with pytest.raises(RuntimeError, match="not new"):
        engine.ranks[0].call("stage_experts", 1, [(layer, slots)])
    with pytest.raises(RuntimeError, match="layer 0 has no routed experts"):
        engine.ranks[0].call("stage_experts", 2, [(0, slots)])
    with pytest.raises(RuntimeError, match="of 8 experts on 2 ranks"):
        engine.ranks[0].call("stage_experts", 2, [(layer, [[0, 1, 2], [3, 4, 5]])])
    with pytest.raises(RuntimeError, match="not staged"):
        engine.ranks[0].call("switch_experts", 2, 1.0)
    engine.stop()


async def test_routing_is_recorded(start: StartEngine, tmp_path: Path) -> None:
    engine = start(data=2)
    addresses = engine.start()
    expected = await _generate(addresses)
    before = [rank.call("expert_loads")["counts"] for rank in engine.ranks]
    engine.on_all("record_routing", str(tmp_path / "routing"))
    assert await _generate(addresses) == expected
    engine.on_all("record_routing", None)
    after = [rank.call("expert_loads")["counts"] for rank in engine.ranks]
    recording = read_recording(tmp_path / "routing", tokens_per_part=16)
    assert list(recording.layers) == EXPERT_LAYERS
    counted = np.sum(after, axis=0) - np.sum(before, axis=0)
    assert np.array_equal(np.sum(recording.stages[0].parts, axis=0), counted)
    contiguous, known, bound = compare(recording, 2)
    assert bound.imbalance <= contiguous.imbalance
    assert np.sum(known.carried) == np.sum(contiguous.carried)
    engine.stop()


async def test_an_idle_engine_does_nothing(start: StartEngine) -> None:
    engine = start(data=2)
    addresses = engine.start()
    await _generate(addresses)
    await expect_idle(engine)


async def test_a_death_in_one_group_is_noticed_in_the_other(start: StartEngine) -> None:
    engine = start(data=2)
    addresses = engine.start()
    async with FrontDoorStream(addresses[0]) as stream:
        await stream.submit(1, PROMPTS[1], sampling(LONG))
        await stream.until(lambda: len(stream.tokens.get(1, ())) >= 3)
        engine.ranks[1].process.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        assert await asyncio.to_thread(engine.ranks[0].call, "trouble", 1, 60.0)
        assert time.monotonic() - killed_s < STEP_TIMEOUT_S
        status = engine.ranks[0].call("status")
        assert (status["state"], bool(status["reason"])) == ("interrupted", True)
        assert not stream.finishes, "what is open waits for the next generation"
