"""Whole ranks in processes of their own, served through the session's gRPC stream."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.shoal.v1 import session_pb2
from tests.checkpoints import tiny_llama
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import Engine
from workers.parallel.build import is_built
from workers.parallel.groups import Groups, host_store
from workers.parallel.plan import ParallelPlan
from workers.report import Outdated
from workers.settings import EngineSettings

STEP_TIMEOUT_S = 20.0  # on a busy machine no rank may be taken for one that hangs
HANG_S = 2.0
LONG = 4000  # tokens of a stream that is cut off, however late its reader gets its turn
COLLECTIVES = [
    "gloo",
    pytest.param("shm", marks=pytest.mark.skipif(not is_built(), reason="shared memory is not compiled")),
]
PROMPTS = [[1, 5 + number, *range(40, 40 + 7 * number)] for number in range(8)]

StartEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[StartEngine]:
    engines: list[Engine] = []

    def start_engine(**fields: Any) -> Engine:
        defaults: dict[str, Any] = {
            "engine": "e0",
            "model_name": "tiny",
            "model_path": str(model),
            "plan": ParallelPlan(),
            "dtype": "float32",
            "device": "cpu",
            "max_model_len": 4096,
            "max_batch_tokens": 64,
            "cache_bytes": 1 << 22,
            "step_timeout_s": STEP_TIMEOUT_S,
        }
        folder = tmp_path / str(len(engines))
        folder.mkdir()
        engine = Engine(folder, EngineSettings(**{**defaults, **fields}))
        engines.append(engine)
        return engine

    yield start_engine
    for engine in engines:
        engine.end()


def left_in_shared_memory() -> list[Path]:
    return list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*_shoal_*"))


async def generate(address: str) -> dict[int, list[int]]:
    """Sixteen tokens for each prompt, greedy and drawn by turns."""
    async with FrontDoorStream(address) as stream:
        for number, prompt in enumerate(PROMPTS):
            await stream.submit(number, prompt, sampling(16, temperature=float(number % 2), seed=number))
        await stream.finish(*range(len(PROMPTS)))
        assert all(len(stream.tokens[number]) == 16 for number in range(len(PROMPTS)))
        return stream.tokens


async def test_one_rank_serves_cancels_and_survives_its_front_doors(start: StartEngine) -> None:
    engine = start()
    (address,) = engine.start()
    assert 0 < engine.ranks[0].call("probe", 10) < 10
    async with FrontDoorStream(address) as stream:
        first = stream.messages[0]
        assert (first.generation, first.info.engine, first.info.model) == (1, "e0", "tiny")
        assert first.info.num_blocks == first.load.num_blocks > 0
        for number in range(8):
            await stream.submit(number, PROMPTS[number], sampling(LONG if number < 4 else 20))
        await stream.until(lambda: len(stream.tokens.get(0, ())) >= 3)
        for number in range(4):
            await stream.cancel(number)
        await stream.finish(*range(8))
        assert [stream.finishes[number] for number in range(4)] == [session_pb2.FINISH_CANCELLED] * 4
        assert [stream.finishes[number] for number in range(4, 8)] == [session_pb2.FINISH_LENGTH] * 4
        async with FrontDoorStream(address) as other:
            await other.submit(1, PROMPTS[0], sampling(LONG))
            await other.until(lambda: len(other.tokens.get(1, ())) >= 3)
            await stream.until(lambda: stream.messages[-1].load.num_running == 1)
        # The other front door is gone, and this one hears that its work is gone too.
        await stream.until(lambda: stream.messages[-1].load.num_running == 0)
        assert stream.messages[-1].load.num_free_blocks == first.info.num_blocks
    engine.stop()
    assert engine.on_all("status")[0]["state"] == "stopped"


async def test_what_may_not_come_in_is_refused_and_harms_nobody(start: StartEngine) -> None:
    engine = start()
    (address,) = engine.start()
    async with FrontDoorStream(address) as stream:
        await stream.submit(1, PROMPTS[0], sampling(LONG))
        async with FrontDoorStream(address, secret="wrong") as stranger:
            assert stranger.ended is not None
            assert stranger.ended.code() is grpc.StatusCode.UNAUTHENTICATED
            assert not stranger.messages
        await stream.submit(2, [1, 10**6], sampling(4))
        await stream.submit(3, [1], sampling(4, temperature=-1.0))
        await stream.submit(4, [1], sampling(4, logit_bias={10**6: 1.0}))
        await stream.submit(5, [1] * 5000, sampling(4))
        await stream.finish(2, 3, 4, 5)
        assert [stream.finishes[number] for number in (2, 3, 4, 5)] == [session_pb2.FINISH_REFUSED] * 4
        for number, words in ((2, "prompt_token_ids"), (3, "temperature"), (4, "logit_bias"), (5, "4096")):
            assert words in stream.errors[number]
        async with FrontDoorStream(address) as careless:
            await careless.submit(1, PROMPTS[0], sampling(LONG))
            await careless.submit(1, PROMPTS[0], sampling(LONG))
            await careless.until(lambda: careless.ended is not None)
            assert careless.ended is not None
            assert careless.ended.code() is grpc.StatusCode.INVALID_ARGUMENT
        seen = len(stream.tokens[1])
        await stream.until(lambda: len(stream.tokens[1]) > seen)


@pytest.mark.parametrize("collectives", COLLECTIVES)
async def test_two_ranks_say_what_one_says(start: StartEngine, collectives: str) -> None:
    single = start()
    (address,) = single.start()
    expected = await generate(address)
    single.stop()
    pair = start(plan=ParallelPlan(tensor=2), collectives=collectives)
    (address,) = pair.start()
    assert await generate(address) == expected
    status = pair.on_all("status")
    kind = {"gloo": "gloo", "shm": "deepspeed shared memory"}[collectives]
    assert [rank["collectives"] for rank in status] == [kind, kind]
    assert status[0]["num_blocks"] == status[1]["num_blocks"]
    pair.stop()
    assert [rank["reason"] for rank in pair.on_all("status")] == ["", ""]
    assert left_in_shared_memory() == []


async def test_stopping_ends_what_is_open(start: StartEngine) -> None:
    engine = start()
    (address,) = engine.start()
    async with FrontDoorStream(address) as stream:
        await stream.submit(1, PROMPTS[0], sampling(LONG))
        await stream.until(lambda: bool(stream.tokens.get(1)))
        await asyncio.to_thread(engine.stop)
        await stream.until(lambda: stream.ended is not None)
        assert stream.finishes[1] == session_pb2.FINISH_FAILED
        assert stream.ended is not None
        assert stream.ended.code() is grpc.StatusCode.UNAVAILABLE


async def test_draining_finishes_what_is_open_and_takes_nothing_new(start: StartEngine) -> None:
    engine = start()
    (address,) = engine.start()
    async with FrontDoorStream(address) as stream:
        await stream.submit(1, PROMPTS[0], sampling(400))
        await stream.until(lambda: bool(stream.tokens.get(1)))
        draining = asyncio.create_task(asyncio.to_thread(engine.ranks[0].call, "drain", 30))
        number = 1
        while session_pb2.FINISH_FAILED not in stream.finishes.values():
            number += 1
            await stream.submit(number, PROMPTS[0], sampling(1))
            await stream.finish(number)
        assert stream.errors[number] == "the engine is draining"
        assert await draining is True
        await stream.finish(1)
        assert len(stream.tokens[1]) == 400


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
@pytest.mark.parametrize("collectives", COLLECTIVES)
async def test_a_lost_follower_fails_what_is_open_in_time(
    start: StartEngine, collectives: str, how: signal.Signals
) -> None:
    timeout_s = HANG_S if how is signal.SIGSTOP else STEP_TIMEOUT_S
    engine = start(plan=ParallelPlan(tensor=2), collectives=collectives, step_timeout_s=timeout_s)
    (address,) = engine.start()
    first, follower = engine.ranks
    async with FrontDoorStream(address) as stream:
        for number in range(4):
            await stream.submit(number, PROMPTS[number], sampling(LONG))
        await stream.until(lambda: all(stream.tokens.get(number) for number in range(4)))
        os.kill(follower.process.pid, how)
        killed_s = time.monotonic()
        await stream.finish(*range(4))
        assert time.monotonic() - killed_s < STEP_TIMEOUT_S, "a crash is no silence, and a silence ends soon"
        assert set(stream.finishes.values()) == {session_pb2.FINISH_FAILED}
        await stream.until(lambda: stream.ended is not None)
    status = first.call("status")
    assert status["state"] == "broken"
    assert status["reason"]
    with pytest.raises(RuntimeError, match="Broken"):
        first.call("probe", 5)
    first.call("stop")


@pytest.mark.parametrize("collectives", COLLECTIVES)
async def test_a_lost_first_rank_frees_its_followers(start: StartEngine, collectives: str) -> None:
    engine = start(plan=ParallelPlan(tensor=2), collectives=collectives)
    (address,) = engine.start()
    first, follower = engine.ranks
    async with FrontDoorStream(address) as stream:
        await stream.submit(1, PROMPTS[1], sampling(LONG))
        await stream.until(lambda: bool(stream.tokens.get(1)))
        first.process.kill()
        killed_s = time.monotonic()
        while follower.call("status")["state"] != "broken":
            assert time.monotonic() - killed_s < STEP_TIMEOUT_S
            await asyncio.sleep(0.02)
    follower.call("stop")


def test_a_rank_that_does_not_come_is_named_and_not_waited_for_when_it_is_over() -> None:
    store = host_store("127.0.0.1")
    settings = EngineSettings(
        engine="e0",
        model_name="tiny",
        model_path="",
        plan=ParallelPlan(tensor=3),
        dtype="float32",
        device="cpu",
        max_model_len=64,
    )

    def wait(timeout_s: float, *, over: bool) -> None:
        hosts = dict.fromkeys(range(3), "127.0.0.1")
        where = (store.host, store.port)
        Groups.join(settings, 1, generation=4, store=where, hosts=hosts, timeout_s=timeout_s, is_over=lambda: over)

    with pytest.raises(TimeoutError, match=r"ranks \[0, 2\] did not join generation 4"):
        wait(0.2, over=False)
    with pytest.raises(Outdated, match="generation 4 is over"):
        wait(10_000.0, over=True)
