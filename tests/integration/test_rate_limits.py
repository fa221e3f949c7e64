"""Tenants' limits at both doors: who is refused hears when to come back, and nobody else notices."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import openai
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.front_door.quotas import Quota, Quotas
from protos.shoal.v1 import inference_pb2 as pb
from tests.fakes import FakeGroup, says
from tests.integration.doors import Door, open_door, request

KEYS: dict[str, str | tuple[str, ...]] = {"ann": ("key-of-ann", "other-key-of-ann"), "bob": "key-of-bob"}


def key(value: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {value}"),)


def retry_delay_s(error: grpc.aio.AioRpcError) -> float:
    metadata: Any = error.trailing_metadata()  # pairs, whatever the stubs say
    status = status_pb2.Status.FromString(dict(metadata)["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    return float(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)


async def post(door: Door, api_key: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {api_key}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.server.http_port}", headers=headers) as client:
        return await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 10})


async def test_requests_per_minute_over_both_doors_and_all_keys_of_a_tenant() -> None:
    quotas = Quotas(tenants={"ann": Quota(requests_per_minute=3)})
    async with open_door(FakeGroup(says("ok")), api_keys=KEYS, quotas=quotas, http=True) as door:
        first = await post(door, "key-of-ann")
        assert (first.status_code, first.headers["x-ratelimit-limit-requests"]) == (200, "3")
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert "x-ratelimit-limit-tokens" not in first.headers
        await door.stub.GenerateOnce(request(), metadata=key("other-key-of-ann"))
        await door.stub.GenerateOnce(request(), metadata=key("key-of-ann"))
        with pytest.raises(grpc.aio.AioRpcError, match="3 requests per minute") as caught:
            await door.stub.GenerateOnce(request(), metadata=key("key-of-ann"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 0 < retry_delay_s(caught.value) <= 20
        refused = await post(door, "other-key-of-ann")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 0 < int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        for _ in range(5):
            assert (await post(door, "key-of-bob")).status_code == 200
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{door.server.http_port}/v1", api_key="key-of-ann", max_retries=0
        ) as client:
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model="fake", prompt="hi")


async def test_tokens_per_minute_count_prompts_and_answers() -> None:
    quotas = Quotas(default=Quota(tokens_per_minute=600))
    async with open_door(FakeGroup(), quotas=quotas, http=True) as door:
        await door.stub.GenerateOnce(request("x" * 99, max_tokens=400))  # 100 with the beginning of text
        answer = await post(door, "none")
        assert answer.status_code == 200
        assert 80 <= int(answer.headers["x-ratelimit-remaining-tokens"]) < 500
        await door.stub.GenerateOnce(request(max_tokens=300))
        with pytest.raises(grpc.aio.AioRpcError, match="600 tokens per minute"):
            await door.stub.GenerateOnce(request(max_tokens=300))


async def test_so_many_at_once() -> None:
    group = FakeGroup()
    group.hold_at = 1
    quotas = Quotas(default=Quota(max_open=2))
    async with open_door(group, api_keys=KEYS, quotas=quotas) as door:
        streams = [door.stub.Generate(request(), metadata=key("key-of-ann")) for _ in range(2)]
        for stream in streams:
            assert isinstance(await stream.read(), pb.GenerateChunk)
        with pytest.raises(grpc.aio.AioRpcError, match="2 requests at once"):
            await door.stub.GenerateOnce(request(), metadata=key("key-of-ann"))
        other = door.stub.Generate(request(), metadata=key("key-of-bob"))
        assert isinstance(await other.read(), pb.GenerateChunk)
        streams[0].cancel()
        await group.until(lambda group: group.num_running == 2)
        again = door.stub.Generate(request(), metadata=key("key-of-ann"))
        assert isinstance(await again.read(), pb.GenerateChunk)
        for stream in (streams[1], other, again):
            stream.cancel()


async def test_the_tenant_reaches_the_group() -> None:
    group = FakeGroup(says("ok"))
    async with open_door(group, api_keys=KEYS) as door:
        await door.stub.GenerateOnce(request(), metadata=key("other-key-of-ann"))
    assert [submit.tenant for submit in group.submits] == ["ann"]
