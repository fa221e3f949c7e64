"""Many requests over one stream."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import grpc

from protos.shoal.v1 import inference_pb2 as pb
from tests.fakes import BOS, FakeGroup
from tests.integration.doors import expected_text, open_door

Session = grpc.aio.StreamStreamCall[Any, pb.SessionEvent]


def _generate(request_id: str, seed: int, *, max_tokens: int = 10, text: str = "hi") -> pb.SessionRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, seed=seed)
    return pb.SessionRequest(generate=pb.GenerateRequest(text=text, request_id=request_id, sampling=sampling))


async def _event(session: Session) -> pb.SessionEvent:
    event = await session.read()
    assert isinstance(event, pb.SessionEvent)
    return event


async def _all(session: Session) -> list[pb.SessionEvent]:
    events = []
    while isinstance(event := await session.read(), pb.SessionEvent):
        events.append(event)
    return events


def _session(channel: grpc.aio.Channel) -> Session:
    open_session = channel.stream_stream(
        "/shoal.v1.Inference/Session",
        request_serializer=pb.SessionRequest.SerializeToString,
        response_deserializer=pb.SessionEvent.FromString,
    )
    return open_session()  # type: ignore[call-arg]  # without an iterator, `write` sends


async def test_requests_share_a_stream_and_are_told_apart() -> None:
    async with open_door(FakeGroup(), FakeGroup(key="engine/1")) as door:
        session = _session(door.channel)
        for seed in range(20):
            await session.write(_generate(f"r{seed}", seed))
        chat = pb.ChatRequest(request_id="chat", messages=[pb.ChatMessage(role="user", content="a")])
        chat.sampling.max_tokens = 3
        await session.write(pb.SessionRequest(chat=chat))
        await session.done_writing()
        texts: dict[str, str] = defaultdict(str)
        for event in await _all(session):
            assert event.WhichOneof("event") == "chunk"
            texts[event.chunk.request_id] += event.chunk.text
    assert len(texts.pop("chat")) == 3
    assert texts == {f"r{seed}": expected_text([BOS, *b"hi"], seed, 10) for seed in range(20)}


async def test_an_error_ends_its_request_only() -> None:
    group = FakeGroup()
    async with open_door(group) as door:
        session = _session(door.channel)
        bad = {
            "": (_generate("", 1), 3, "request_id"),
            "twice": (_generate("good", 1), 6, "request_id"),
            "long": (_generate("long", 1, text="x" * 600), 3, "text"),
            "cold": (
                pb.SessionRequest(
                    generate=pb.GenerateRequest(text="x", request_id="cold", sampling=pb.SamplingParams(temperature=-1))
                ),
                3,
                "temperature",
            ),
            "none": (pb.SessionRequest(cancel=pb.CancelRequest(request_id="none")), 5, "request_id"),
            "empty": (pb.SessionRequest(), 3, "action"),
        }
        group.pause()
        await session.write(_generate("good", 1))
        for message, code, field in bad.values():
            await session.write(message)
            error = (await _event(session)).error
            assert (error.code, error.field) == (code, field)
            assert error.message
        group.go_on()
        await session.done_writing()
        events = await _all(session)
        assert "".join(event.chunk.text for event in events) == expected_text([BOS, *b"hi"], 1, 10)


async def test_cancel_reaches_a_request_that_was_only_just_sent() -> None:
    group = FakeGroup()
    group.hold_at = 0
    async with open_door(group) as door:
        session = _session(door.channel)
        for number in range(10):
            await session.write(_generate(f"r{number}", 1))
            await session.write(pb.SessionRequest(cancel=pb.CancelRequest(request_id=f"r{number}")))
        await session.done_writing()
        ends = {event.chunk.request_id: event.chunk.finish_reason for event in await _all(session)}
        assert ends == {f"r{number}": pb.FINISH_REASON_CANCELLED for number in range(10)}
        assert door.server.num_open == 0


async def test_a_client_that_goes_away_frees_all_its_work() -> None:
    group = FakeGroup()
    group.hold_at = 2
    async with open_door(group) as door:
        session = _session(door.channel)
        for number in range(5):
            await session.write(_generate(f"r{number}", number))
        await group.until(lambda it: it.num_running == 5)
        session.cancel()
        await group.until(lambda it: len(it.cancels) == 5)
        assert door.server.num_open == 0
        assert group.num_running == 0


async def test_a_broken_message_in_the_stream_is_answered() -> None:
    async with open_door(FakeGroup()) as door:
        raw = door.channel.stream_stream("/shoal.v1.Inference/Session", None, pb.SessionEvent.FromString)
        call: Session = raw()  # type: ignore[call-arg]  # without an iterator, `write` sends
        await call.write(b"\xff\xff")
        assert "UTF-8" in (await _event(call)).error.message
        await call.write(_generate("good", 1, max_tokens=1).SerializeToString())
        assert (await _event(call)).chunk.finish_reason == pb.FINISH_REASON_LENGTH
        await call.done_writing()
        assert await _all(call) == []
