"""Two front doors before the same DP groups: what one has begun, the other goes on with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from cluster.client.held import Held
from cluster.client.streams import follow
from cluster.front_door.server import FrontDoorServer, FrontDoorSettings
from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc
from tests.fakes import BOS, CARD, SECRET, ByteCodec, FakeGroup, LineTemplate
from tests.integration.doors import Door, expected_text, open_door, ready, request, rest, take

PROMPT = [BOS, *b"hi"]


@asynccontextmanager
async def second_door(*groups: FakeGroup) -> AsyncIterator[Door]:
    """Before groups that serve already."""
    settings = FrontDoorSettings(front_door_id="second", secret=SECRET, grpc_port=0, http_port=0)
    server = FrontDoorServer(settings, card=CARD, codec=ByteCodec(), template=LineTemplate())
    await server.start()
    try:
        server.set_groups([group.address for group in groups])
        await ready(server, len(groups))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            yield Door(server, channel, inference_pb2_grpc.InferenceStub(channel))
    finally:
        await server.stop()


@pytest.mark.parametrize("alive", [True, False])
async def test_a_stream_goes_on_at_another_front_door(alive: bool) -> None:
    groups = FakeGroup(key="engine/0"), FakeGroup(key="engine/1")
    for group in groups:
        group.hold_at = 20
    async with open_door(*groups) as first, second_door(*groups) as second:
        asked = request(seed=7, max_tokens=40, n=2, logprobs=1)
        asked.request_id = "mine"
        stream = first.stub.Generate(asked)
        held = Held(asked)
        while min(map(len, held.token_ids)) < 10:
            held.take(await take(stream))
        if not alive:
            await first.server.stop()
        positions = [len(tokens) for tokens in held.token_ids]
        resumed = second.stub.Resume(pb.ResumeRequest(request_id="mine", positions=positions))
        if alive:  # the first stream ends while its request still has tokens to come
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(stream)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
        for group in groups:
            group.release()
        chunks = await rest(resumed)
        for chunk in chunks:
            assert len(chunk.logprobs) == len(chunk.token_ids)
            held.take(chunk)
        assert bytes(held.token_ids[0]).decode() == expected_text(PROMPT, 7, 40)
        assert len(held.token_ids[1]) == 40
        assert chunks[-1].usage.completion_tokens == 80


async def test_our_client_follows_when_everything_that_knew_has_died() -> None:
    group, other = FakeGroup(key="engine/0"), FakeGroup(key="engine/1")
    group.hold_at = other.hold_at = 10
    async with open_door(group) as first:
        await other.start()
        try:
            async with second_door(other) as second:
                targets = [first.target, second.target]
                held = Held(request(seed=7, max_tokens=30))
                chunks = follow(lambda: grpc.aio.insecure_channel(targets.pop(0)), held)
                while len(held.token_ids[0]) < 10:
                    await anext(chunks)
                await first.server.stop()
                await group.stop()
                other.release()
                async for _ in chunks:
                    pass
                assert bytes(held.token_ids[0]).decode() == expected_text(PROMPT, 7, 30)
        finally:
            await other.stop()


async def test_a_unary_retry_attaches_to_the_running_request() -> None:
    group = FakeGroup()
    group.hold_at = 5
    async with open_door(group) as first, second_door(group) as second:
        asked = request(seed=7, max_tokens=20)
        asked.idempotency_key = "once"
        lost = asyncio.ensure_future(first.stub.GenerateOnce(asked))
        await group.until(lambda it: any(len(record.token_ids) == 5 for record in it.records.find("", "once")))
        retry = asyncio.ensure_future(second.stub.GenerateOnce(asked))
        with pytest.raises(grpc.aio.AioRpcError):
            await lost
        group.release()
        answer = await retry
        assert answer.choices[0].text == expected_text(PROMPT, 7, 20)
        assert answer.request_id == "once"
        assert len(group.submits[-1].output_token_ids) >= 5, "it went on"
        num_submits = len(group.submits)
        again = await first.stub.GenerateOnce(asked)
        assert again.choices[0].text == answer.choices[0].text
        assert len(group.submits) == num_submits, "a finished answer is only told again"
        other = request(seed=8, max_tokens=20)
        other.idempotency_key = "once"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await second.stub.GenerateOnce(other)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_the_idempotency_key_is_an_http_header() -> None:
    group = FakeGroup()
    async with open_door(group, http=True) as first, second_door(group) as second:
        body = {"model": "fake", "prompt": "hi", "max_tokens": 8, "seed": 7}
        answers = []
        async with httpx.AsyncClient() as client:
            for door in (first, second, first):
                url = f"http://127.0.0.1:{door.server.http_port}/v1/completions"
                answers.append(await client.post(url, json=body, headers={"Idempotency-Key": "k-1"}))
            refused = await client.post(url, json={**body, "seed": 8}, headers={"Idempotency-Key": "k-1"})
        texts = {answer.json()["choices"][0]["text"] for answer in answers}
        assert texts == {expected_text(PROMPT, 7, 8)}
        assert len(group.submits) == 1
        assert refused.status_code == 409
        assert refused.json()["error"]["param"] == "idempotency_key"


async def test_a_cancel_at_another_front_door_ends_the_request() -> None:
    group = FakeGroup()
    group.hold_at = 5
    async with open_door(group) as first, second_door(group) as second:
        asked = request(seed=7, max_tokens=20)
        asked.request_id = "mine"
        stream = first.stub.Generate(asked)
        await take(stream)
        assert (await second.stub.Cancel(pb.CancelRequest(request_id="mine"))).found
        assert (await rest(stream))[-1].finish_reason == pb.FINISH_REASON_CANCELLED
        assert not (await second.stub.Cancel(pb.CancelRequest(request_id="mine"))).found


async def _events(response: httpx.Response, most: int | None = None) -> list[tuple[str, str]]:
    """Ids and texts of a stream's events; of no more than `most`."""
    found: list[tuple[str, str]] = []
    last_id = ""
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            last_id = line.removeprefix("id: ")
        elif line.startswith("data: {"):
            found += [(last_id, choice["text"]) for choice in json.loads(line[6:])["choices"]]
            if len(found) == most:
                break
    return found


async def test_an_http_stream_goes_on_behind_the_last_event() -> None:
    group = FakeGroup()
    group.hold_at = 5
    async with open_door(group, http=True) as first, second_door(group) as second, httpx.AsyncClient() as client:
        body = {"model": "fake", "prompt": "hi", "max_tokens": 30, "seed": 7, "stream": True}
        headers = {"Idempotency-Key": "s-1"}
        urls = [f"http://127.0.0.1:{door.server.http_port}/v1/completions" for door in (first, second)]
        async with client.stream("POST", urls[0], json=body, headers=headers) as stream:
            begun = await _events(stream, most=1)
        group.release()
        headers["Last-Event-ID"] = begun[-1][0]
        async with client.stream("POST", urls[1], json=body, headers=headers) as stream:
            assert stream.status_code == 200
            rest_of_it = await _events(stream)
        assert "".join(text for _, text in begun + rest_of_it) == expected_text(PROMPT, 7, 30)
        assert rest_of_it[-1][0] == "30"
        headers["Idempotency-Key"] = "another"
        unknown = await client.post(urls[0], json=body, headers=headers)
        assert unknown.status_code == 404
        assert unknown.json()["error"]["param"] == "last-event-id"
        assert "send it anew" in unknown.json()["error"]["message"]
