"""DP groups and clients that go away in the middle of a stream, over a real wire on both sides."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from cluster.front_door.limits import Limits
from protos.shoal.v1 import inference_pb2 as pb
from tests.fakes import BOS, FakeGroup
from tests.integration.doors import Stream, expected_text, open_door, ready, request, rest, take

PROMPT = [BOS, *b"hi"]
NUM_TOKENS = 60


def _check(chunks: list[pb.GenerateChunk], index: int = 0) -> str:
    """No token repeated, none skipped; returns the text."""
    position = 0
    for chunk in chunks:
        if chunk.index == index:
            assert chunk.position == position
            position += len(chunk.token_ids)
    assert position == NUM_TOKENS
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


async def _until_token(stream: Stream, number: int) -> list[pb.GenerateChunk]:
    """Reads until the first choice has had this many tokens."""
    chunks: list[pb.GenerateChunk] = []
    while not chunks or chunks[-1].position + len(chunks[-1].token_ids) < number:
        chunks.append(await take(stream))
    return chunks


async def test_a_killed_group_is_a_pause_and_nothing_more() -> None:
    first, second = FakeGroup(key="engine/0"), FakeGroup(key="engine/1")
    first.hold_at = second.hold_at = 20
    async with open_door(first, second) as door:
        stream = door.stub.Generate(request(max_tokens=NUM_TOKENS, seed=5))
        chunks = await _until_token(stream, 20)
        hit, other = (first, second) if first.submits else (second, first)
        other.release()
        await hit.stop()
        chunks += await rest(stream)
        assert bytes(other.submits[0].output_token_ids).decode() == expected_text(PROMPT, 5, 20)
    assert _check(chunks) == expected_text(PROMPT, 5, NUM_TOKENS)
    assert chunks[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=NUM_TOKENS)


async def test_streams_killed_again_and_again_give_the_same_stream() -> None:
    groups = [FakeGroup(key="engine/0"), FakeGroup(key="engine/1")]
    async with open_door(*groups, limits=Limits(max_replays=100)) as door:
        undisturbed = [chunk async for chunk in door.stub.Generate(request(max_tokens=NUM_TOKENS, seed=5, n=2))]
        for group in groups:
            group.hold_at = 5
        stream = door.stub.Generate(request(max_tokens=NUM_TOKENS, seed=5, n=2))
        chunks: list[pb.GenerateChunk] = []
        for held in range(5, NUM_TOKENS + 5, 5):
            while sum(len(chunk.token_ids) for chunk in chunks) < 2 * held:
                chunks.append(await take(stream))
            for group in groups:
                group.hold_at = held + 5
                group.break_streams()
        chunks += await rest(stream)
    for index in range(2):
        assert _check(chunks, index) == _check(undisturbed, index)


async def test_an_engine_that_fails_its_sequences_is_replayed() -> None:
    first, second = FakeGroup(key="engine/0"), FakeGroup(key="engine/1")
    first.fail_at = second.fail_at = 10
    async with open_door(first, second) as door:
        stream = door.stub.Generate(request(max_tokens=NUM_TOKENS, seed=5))
        chunks = await _until_token(stream, 10)
        await first.until(lambda it: bool(it.submits and second.submits))
        first.fail_at = second.fail_at = None
        chunks += await rest(stream)
    assert _check(chunks) == expected_text(PROMPT, 5, NUM_TOKENS)


async def test_a_group_that_always_fails_ends_the_request() -> None:
    group = FakeGroup()
    group.fail_at = 3
    async with open_door(group, limits=Limits(max_replays=2)) as door:
        with pytest.raises(grpc.aio.AioRpcError, match="failed this request too often") as caught:
            await door.stub.GenerateOnce(request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        group.fail_at = None
        assert (await door.stub.GenerateOnce(request(max_tokens=2))).choices


async def test_the_only_group_comes_back() -> None:
    group = FakeGroup()
    group.hold_at = 10
    async with open_door(group) as door:
        stream = door.stub.Generate(request(max_tokens=NUM_TOKENS, seed=5))
        chunks = await _until_token(stream, 10)
        port = group.port
        await group.stop()
        group.release()
        await group.start(port)
        chunks += await rest(stream)
    assert _check(chunks) == expected_text(PROMPT, 5, NUM_TOKENS)


async def test_a_restarted_group_of_an_older_generation_is_not_heard() -> None:
    stale, good = FakeGroup(key="engine/0"), FakeGroup(key="engine/1")
    stale.generation, good.generation = 1, 2
    async with open_door(good) as door:
        await stale.start()
        try:
            address = stale.address
            newer = type(address)(
                key=address.key, engine="engine", dp_group=0, host=address.host, port=address.port, generation=2
            )
            door.server.set_groups([newer, good.address])
            await stale.until(lambda it: it.num_streams >= 2)
            assert not door.server.links.links["engine/0"].ready
            stale.generation = 2
            await ready(door.server, 2)
        finally:
            await stale.stop()


async def test_a_client_comes_back_for_the_rest() -> None:
    group = FakeGroup()
    group.hold_at = 20
    async with open_door(group) as door:
        ask = request(max_tokens=NUM_TOKENS, seed=5)
        ask.request_id = "mine"
        stream = door.stub.Generate(ask)
        chunks = await _until_token(stream, 20)
        stream.cancel()
        await group.until(lambda it: len(it.cancels) == 1)
        group.release()
        async with grpc.aio.insecure_channel(door.target) as channel:
            resume = channel.unary_stream(
                "/shoal.v1.Inference/Resume",
                request_serializer=pb.ResumeRequest.SerializeToString,
                response_deserializer=pb.GenerateChunk.FromString,
            )
            chunks += await rest(resume(pb.ResumeRequest(request_id="mine", positions=[20])))
        assert _check(chunks) == expected_text(PROMPT, 5, NUM_TOKENS)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(door.stub.Resume(pb.ResumeRequest(request_id="other", positions=[0])))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_drain_finishes_what_is_open() -> None:
    group = FakeGroup()
    group.hold_at = 5
    async with open_door(group) as door:
        stream = door.stub.Generate(request(max_tokens=NUM_TOKENS, seed=5))
        chunks = await _until_token(stream, 5)
        draining = asyncio.create_task(door.server.drain(20))
        group.release()
        group.go_on()
        chunks += await rest(stream)
        await draining
    assert _check(chunks) == expected_text(PROMPT, 5, NUM_TOKENS)


async def test_drain_ends_what_does_not_finish() -> None:
    group = FakeGroup()
    group.hold_at = 5
    async with open_door(group) as door:
        stream = door.stub.Generate(request(max_tokens=NUM_TOKENS))
        await _until_token(stream, 5)
        await door.server.drain(0.05)
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
            await rest(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await group.until(lambda it: len(it.cancels) == 1)
