"""What the doors carry to the DP groups and back: classes, deadlines, hints when to retry, cached tokens."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos.shoal.v1 import inference_pb2 as pb
from tests.fakes import FakeGroup
from tests.integration.doors import Door, open_door, request

LATE = "not to be done by its deadline: about 4 s are needed, 2 s are left"


def retry_s(error: grpc.aio.AioRpcError) -> float:
    """The pause in the rich details."""
    metadata: Any = error.trailing_metadata()
    status = status_pb2.Status.FromString(dict(metadata)["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    (found,) = [each for each in status.details if each.Is(info.DESCRIPTOR)]
    found.Unpack(info)
    return float(info.retry_delay.ToTimedelta().total_seconds())


def refusing() -> FakeGroup:
    group = FakeGroup()
    group.refuse, group.retry_after_s = LATE, 2.25
    return group


async def post(door: Door, **body: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.server.http_port}") as client:
        return await client.post("/v1/completions", json={"model": "fake", "prompt": "hi", **body})


async def test_a_refusal_says_when_to_come_back_over_grpc() -> None:
    async with open_door(refusing()) as door:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.stub.GenerateOnce(request())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == LATE
        assert retry_s(caught.value) == 2.25
        session = door.stub.Session(iter([pb.SessionRequest(generate=pb.GenerateRequest(text="hi", request_id="r"))]))
        (event,) = [event async for event in session]
        assert (event.error.code, event.error.retry_after_s) == (8, 2.25)


async def test_a_refusal_says_when_to_come_back_over_http() -> None:
    async with open_door(refusing(), http=True) as door:
        for stream in (False, True):
            response = await post(door, stream=stream)
            assert (response.status_code, response.headers["retry-after"]) == (429, "3")
            assert response.json()["error"]["message"] == LATE


async def test_class_and_deadline_come_through_both_doors() -> None:
    group = FakeGroup()
    async with open_door(group, http=True) as door:
        await door.stub.GenerateOnce(pb.GenerateRequest(text="hi", priority=-3), timeout=40.0)
        assert (await post(door, priority=7, timeout=30.0)).status_code == 200
    by_grpc, by_http = group.submits
    assert (by_grpc.priority, by_http.priority) == (-3, 7)
    assert 30.0 < by_grpc.timeout_s <= 40.0 * 1.01  # on the wire gRPC rounds what is left up
    assert 20.0 < by_http.timeout_s <= 30.0


async def test_tenants_are_the_names_of_keys() -> None:
    group = FakeGroup()
    async with open_door(group, api_keys={"alice": "secret-one", "bob": "secret-two"}) as door:
        for key in ("secret-two", "secret-one"):
            await door.stub.GenerateOnce(request(), metadata=(("authorization", f"Bearer {key}"),))
    assert [submit.tenant for submit in group.submits] == ["bob", "alice"]


async def test_cached_tokens_are_in_the_usage_of_both_doors() -> None:
    group = FakeGroup()
    group.num_cached_tokens = 2
    async with open_door(group, http=True) as door:
        response = await door.stub.GenerateOnce(request(max_tokens=2))
        assert response.usage == pb.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=2)
        usage = (await post(door, max_tokens=2)).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_turns_of_a_conversation_go_to_one_group() -> None:
    groups = [FakeGroup(key=f"engine-{index}/0") for index in range(3)]
    async with open_door(*groups) as door:
        said = "tell me of the sea, and of all the fish that are in it, until the night has come. "
        for turn in range(1, 5):
            await door.stub.GenerateOnce(request(said * turn, max_tokens=2))
    assert sorted(len(group.submits) for group in groups) == [0, 0, 4]
