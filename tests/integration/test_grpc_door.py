"""The gRPC door over a real wire on both sides."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.front_door import grpc_server
from cluster.front_door.limits import Limits
from cluster.front_door.server import FrontDoorServer, FrontDoorSettings
from protos.shoal.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.shoal.v1 import inference_pb2 as pb
from tests.fakes import BOS, CARD, EOS, SECRET, ByteCodec, FakeGroup, says, serving
from tests.integration.doors import Door, FakeOperations, expected_text, open_door, request, rest, take

HI = [BOS, *b"hi"]


def _join(chunks: list[pb.GenerateChunk], index: int = 0) -> str:
    """The text of a choice whose positions must be without gap or repeat."""
    position = 0
    for chunk in chunks:
        if chunk.index == index:
            assert chunk.position == position
            position += len(chunk.token_ids)
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


async def test_generate_streams() -> None:
    async with open_door(FakeGroup()) as door:
        chunks = [chunk async for chunk in door.stub.Generate(request(max_tokens=50, seed=3, prompt_logprobs=1))]
    assert _join(chunks) == expected_text(HI, 3, 50)
    assert (chunks[0].model, list(chunks[0].prompt_token_ids)) == ("fake", HI)
    assert len(chunks[0].prompt_logprobs) == 3
    assert not chunks[0].prompt_logprobs[0].HasField("chosen")
    assert chunks[0].prompt_logprobs[1].chosen.token == b"h"
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=50)
    assert len({chunk.request_id for chunk in chunks}) == 1


async def test_generate_once_with_choices_and_logprobs() -> None:
    async with open_door(FakeGroup(), FakeGroup(key="engine/1")) as door:
        response = await door.stub.GenerateOnce(request(max_tokens=8, seed=3, n=4, logprobs=2))
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    assert response.choices[0].text == expected_text(HI, 3, 8)
    assert len({choice.text for choice in response.choices}) == 4
    assert response.usage == pb.Usage(prompt_tokens=3, completion_tokens=32)
    entry = response.choices[2].logprobs[7]
    assert entry.chosen.token_id == response.choices[2].token_ids[7]
    assert [alternative.rank for alternative in entry.top] == [1, 2]


async def test_chat_renders_the_template() -> None:
    group = FakeGroup(says("hello"))
    async with open_door(group) as door:
        chat = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hi")], request_id="mine")
        chunks = [chunk async for chunk in door.stub.Chat(chat)]
        assert bytes(group.submits[0].prompt_token_ids) == b"user: hi\nassistant: "
    assert _join(chunks) == "hello"
    assert (chunks[-1].finish_reason, chunks[-1].stop_token_id) == (pb.FINISH_REASON_STOP, EOS)
    assert chunks[0].request_id == "mine"


async def test_stop_strings_and_characters_over_tokens() -> None:
    group = FakeGroup(says("naïve 🐟 EN END of it"))
    async with open_door(group) as door:
        for tokens_per_step in (1, 3):
            group.tokens_per_step = tokens_per_step
            chunks = [chunk async for chunk in door.stub.Generate(request(stop=["END", "never"]))]
            assert _join(chunks) == "naïve 🐟 EN "
            assert chunks[-1].stop_string == "END"
            assert b"".join(bytes(chunk.token_ids) for chunk in chunks) == "naïve 🐟 EN END".encode()
            await group.until(lambda it: not it.num_running)


async def test_what_else_there_is_to_ask() -> None:
    async with open_door(FakeGroup()) as door:
        tokens = await door.stub.Tokenize(pb.TokenizeRequest(text="hé"))
        assert list(tokens.token_ids) == [BOS, *"hé".encode()]
        assert tokens.max_model_len == 512
        chat = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="a")], add_generation_prompt=False)
        assert bytes((await door.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids) == b"user: a\n"
        text = await door.stub.Detokenize(pb.DetokenizeRequest(token_ids=[*b"hi", EOS], skip_special_tokens=True))
        assert text.text == "hi"
        (model,) = (await door.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.name, model.max_model_len, model.vocab_size) == ("fake", 512, 260)


async def _refusal(door: Door, bad: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.GenerateOnce(bad)
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        await door.stub.Generate(bad).read()
    assert (streamed.value.code(), streamed.value.details()) == (caught.value.code(), caught.value.details())
    return caught.value


def _details(error: grpc.aio.AioRpcError) -> bytes:
    """The packed google.rpc.Status."""
    metadata: Any = error.trailing_metadata()  # pairs, whatever the stubs say
    found = dict(metadata)["grpc-status-details-bin"]
    assert isinstance(found, bytes)
    return found


def _fields(error: grpc.aio.AioRpcError) -> list[str]:
    """The fields named in the rich details."""
    violations = error_details_pb2.BadRequest()
    for packed in status_pb2.Status.FromString(_details(error)).details:
        if packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            packed.Unpack(violations)
    return [violation.field for violation in violations.field_violations]


@pytest.mark.parametrize(
    ("bad", "code", "field"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[260])), grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        (pb.GenerateRequest(model="other", text="x"), grpc.StatusCode.NOT_FOUND, "model"),
        (request("x" * 600), grpc.StatusCode.INVALID_ARGUMENT, "text"),
        (request(temperature=-1), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (request(temperature=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (request(top_p=float("inf")), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        (request(n=17), grpc.StatusCode.INVALID_ARGUMENT, "n"),
        (request(logprobs=21), grpc.StatusCode.INVALID_ARGUMENT, "logprobs"),
        (request(max_tokens=2**31 - 1), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (request(stop=["x"] * 17), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
        (request(stop_token_ids=[999]), grpc.StatusCode.INVALID_ARGUMENT, "stop_token_ids"),
        (request(logit_bias={2**31: 1.0}), grpc.StatusCode.INVALID_ARGUMENT, "logit_bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_input_names_its_field_and_harms_nothing(
    bad: pb.GenerateRequest, code: grpc.StatusCode, field: str
) -> None:
    async with open_door(FakeGroup()) as door:
        error = await _refusal(door, bad)
        assert error.code() is code
        assert _fields(error) == [field]
        assert len((await door.stub.GenerateOnce(request(max_tokens=3))).choices[0].text) == 3
        assert door.server.num_open == 0


@pytest.mark.parametrize("data", [b"\x12\x02\xff\xfe", b"\xff\xff\xff", b"\x12\x7fshort"])
async def test_what_is_no_message_is_the_clients_mistake(data: bytes) -> None:
    async with open_door(FakeGroup()) as door:
        for method in ("GenerateOnce", "Tokenize"):
            with pytest.raises(grpc.aio.AioRpcError, match="UTF-8") as caught:
                await door.channel.unary_unary(f"/shoal.v1.Inference/{method}", None, None)(data)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError, match="UTF-8"):
            await door.channel.unary_stream("/shoal.v1.Inference/Generate", None, None)(data).read()
        assert (await door.stub.GenerateOnce(request(max_tokens=1))).choices


async def test_too_large_a_message_is_refused() -> None:
    async with open_door(FakeGroup(), limits=Limits(max_message_bytes=10_000)) as door:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.stub.GenerateOnce(request("x" * 20_000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await door.stub.GenerateOnce(request(max_tokens=1))).choices


async def test_what_we_did_not_foresee_is_an_incident_and_nothing_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_door(FakeGroup()) as door:
        monkeypatch.setattr(door.server.desk, "models", lambda: 1 / 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.stub.ListModels(pb.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "division" not in (caught.value.details() or "")
        assert "ZeroDivisionError" in caplog.text
        assert (await door.stub.GenerateOnce(request(max_tokens=1))).choices


async def test_overload_says_when_to_try_again() -> None:
    group = FakeGroup()
    async with open_door(group, limits=Limits(max_open_requests=1)) as door:
        group.pause()
        first = door.stub.GenerateOnce(request(max_tokens=1))
        await group.until(lambda it: it.num_running == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.stub.GenerateOnce(request())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert b"RetryInfo" in _details(caught.value)
        group.go_on()
        assert (await first).choices


async def test_keys_keep_others_out_and_requests_apart() -> None:
    group = FakeGroup()
    ann = (("authorization", "Bearer key-of-ann"),)
    bob = (("x-api-key", "key-of-bob"),)
    async with open_door(group, api_keys={"ann": "key-of-ann", "bob": "key-of-bob"}) as door:
        for metadata in ((), (("authorization", "Bearer guess"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await door.stub.GenerateOnce(request(), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert group.submits == []
        group.pause()
        mine = door.stub.GenerateOnce(pb.GenerateRequest(text="x", request_id="r"), metadata=ann)
        await group.until(lambda it: it.num_running == 1)
        assert group.submits[0].tenant == "ann"
        cancel = pb.CancelRequest(request_id="r")
        assert not (await door.stub.Cancel(cancel, metadata=bob)).found
        assert (await door.stub.Cancel(cancel, metadata=ann)).found
        assert (await mine).choices[0].finish_reason == pb.FINISH_REASON_CANCELLED
        health = health_pb2_grpc.HealthStub(door.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


async def test_cancel_frees_the_work() -> None:
    group = FakeGroup()
    group.hold_at = 5
    async with open_door(group) as door:
        call = door.stub.Generate(pb.GenerateRequest(text="x", request_id="r", sampling=pb.SamplingParams(n=2)))
        got = 0
        while got < 10:
            got += len((await take(call)).token_ids)
        assert (await door.stub.Cancel(pb.CancelRequest(request_id="r"))).found
        await group.until(lambda it: len(it.cancels) == 2)
        assert group.num_running == 0
        ends = await rest(call)
        assert {chunk.finish_reason for chunk in ends} == {pb.FINISH_REASON_CANCELLED}
        assert ends[-1].usage.completion_tokens == 10
        assert not (await door.stub.Cancel(pb.CancelRequest(request_id="r"))).found


async def test_a_client_that_goes_away_frees_the_work() -> None:
    group = FakeGroup()
    group.hold_at = 3
    async with open_door(group) as door:
        streamed = door.stub.Generate(request(n=3))
        await take(streamed)
        once = door.stub.GenerateOnce(request())
        await group.until(lambda it: it.num_running == 4)
        streamed.cancel()
        once.cancel()
        await group.until(lambda it: len(it.cancels) == 4)
        assert group.num_running == 0
        assert door.server.num_open == 0


async def test_the_clients_deadline_ends_the_work() -> None:
    group = FakeGroup()
    group.hold_at = 3
    async with open_door(group) as door:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.stub.GenerateOnce(request(), timeout=2.0)  # time enough to get to the group
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0 < group.submits[0].timeout_s < 2.5  # gRPC rounds up
        await group.until(lambda it: len(it.cancels) == 1)


async def test_a_slow_reader_costs_merged_chunks_and_hinders_nobody() -> None:
    group = FakeGroup()
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]
    async with open_door(group) as door, grpc.aio.insecure_channel(door.target, options=small_window) as narrow:
        generate = narrow.unary_stream(
            "/shoal.v1.Inference/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateChunk.FromString,
        )
        slow = generate(request(max_tokens=500, seed=1, logprobs=20))
        chunks = [await take(slow)]
        await group.until(lambda it: not it.num_running)
        assert (await door.stub.GenerateOnce(request(max_tokens=5))).choices
        chunks += await rest(slow)
    assert _join(chunks) == expected_text(HI, 1, 500)
    assert len(chunks) < 450


async def test_health_follows_readiness() -> None:
    group = FakeGroup()
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with open_door(group) as door:
        watch = health_pb2_grpc.HealthStub(door.channel).Watch(
            health_pb2.HealthCheckRequest(service="shoal.v1.Inference")
        )
        assert (await watch.read()).status == serving
        group.pause()
        await group.stop()
        assert (await watch.read()).status == not_serving
        await group.start(group.port)
        assert (await watch.read()).status == serving
        draining = asyncio.create_task(door.server.drain(5))
        assert (await watch.read()).status == not_serving
        await draining
        while (state := door.channel.get_state()) is grpc.ChannelConnectivity.READY:
            await door.channel.wait_for_state_change(state)  # until the client has heard that the server leaves
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.stub.GenerateOnce(request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def _event(session: Any) -> pb.SessionEvent:
    event = await session.read()
    assert isinstance(event, pb.SessionEvent)
    return event


async def test_a_drain_lets_those_in_who_could_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC would turn away what it has read already, so it is stopped in a moment in which nobody calls."""
    monkeypatch.setattr(grpc_server, "_MOMENT_S", 0.5)
    monkeypatch.setattr(grpc_server, "_CATCH_UP_S", 20.0)
    async with open_door(FakeGroup()) as door:
        assert (await door.stub.GenerateOnce(request(max_tokens=2))).choices
        draining = asyncio.create_task(door.server.drain(5))
        await asyncio.sleep(0)
        for _ in range(50):
            assert (await door.stub.GenerateOnce(request(max_tokens=2))).choices
        assert not draining.done()
        await draining


async def test_a_session_finishes_what_is_open_when_its_front_door_leaves() -> None:
    """And refuses what is new, since its stream hears of it no other way."""

    def named(request_id: str) -> pb.GenerateRequest:
        message = request(max_tokens=20, seed=4)
        message.request_id = request_id
        return message

    group = FakeGroup()
    group.hold_at = 5
    async with open_door(group) as door:
        session: Any = door.stub.Session()  # type: ignore[call-arg]
        await session.write(pb.SessionRequest(generate=named("old")))
        chunks: list[pb.GenerateChunk] = []
        while sum(len(chunk.token_ids) for chunk in chunks) < 5:
            chunks.append((await _event(session)).chunk)
        leaving = asyncio.Event()
        door.server.desk.on_ready_change(leaving.set)
        draining = asyncio.create_task(door.server.drain(20))
        await leaving.wait()
        await session.write(pb.SessionRequest(generate=named("new")))
        error = (await _event(session)).error
        assert (error.request_id, error.code) == ("new", grpc.StatusCode.UNAVAILABLE.value[0])
        assert "open another session" in error.message
        group.release()
        group.go_on()
        await session.done_writing()
        while isinstance(event := await session.read(), pb.SessionEvent):
            chunks.append(event.chunk)
        await draining
    assert _join(chunks) == expected_text(HI, 4, 20)


async def test_a_wrong_secret_gets_nowhere() -> None:
    async with open_door(FakeGroup(), secret="guess", await_groups=False) as door:
        with pytest.raises(grpc.aio.AioRpcError, match="no engine is ready"):
            await door.stub.GenerateOnce(request())


async def test_both_doors_share_the_desk() -> None:
    async with (
        open_door(FakeGroup(), http=True) as door,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.server.http_port}") as client,
    ):
        body = {"model": "fake", "prompt": "hi", "max_tokens": 5, "seed": 3}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["text"] == expected_text(HI, 3, 5)
        assert (await door.stub.GenerateOnce(request(max_tokens=5, seed=3))).choices[0].text == expected_text(HI, 3, 5)
        metrics = (await client.get("/metrics")).text
        assert 'shoal_requests_total{code="ok",door="grpc",model_name="fake"} 1.0' in metrics
        assert 'shoal_requests_total{code="ok",door="http",model_name="fake"} 1.0' in metrics


async def test_a_drain_sends_http_clients_elsewhere() -> None:
    """Over a connection that is open, each gets an answer that ends it."""
    group = FakeGroup()
    group.hold_at = 5
    async with open_door(group, http=True) as door:
        url = f"http://127.0.0.1:{door.server.http_port}"
        async with httpx.AsyncClient(base_url=url) as asking, httpx.AsyncClient(base_url=url) as late:
            assert (await late.get("/readyz")).status_code == 200
            body = {"model": "fake", "prompt": "hi", "max_tokens": 20, "seed": 3}
            slow = asyncio.create_task(asking.post("/v1/completions", json=body))
            await group.until(lambda it: it.num_running == 1)
            leaving = asyncio.Event()
            door.server.desk.on_ready_change(leaving.set)
            draining = asyncio.create_task(door.server.drain(20))
            await leaving.wait()
            ready = await late.get("/readyz")
            assert (ready.status_code, ready.headers["connection"]) == (503, "close")
            with pytest.raises(httpx.ConnectError):
                await late.get("/readyz")
            group.release()
            group.go_on()
            assert (await slow).json()["choices"][0]["text"] == expected_text(HI, 3, 20)
            await draining


async def test_a_drained_front_door_hangs_up_on_idle_http_clients() -> None:
    async with open_door(FakeGroup(), http=True) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.server.http_port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.readuntil(b"}") != b""
        await door.server.drain(5)
        assert await reader.read() == b""
        writer.close()


async def test_front_doors_on_one_node_share_a_port() -> None:
    async with open_door(FakeGroup()) as first, open_door(FakeGroup(), grpc_port=first.server.grpc_port) as second:
        assert first.target == second.target
        await first.server.drain(1)
        await first.server.stop()
        async with grpc.aio.insecure_channel(first.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for _ in range(5):
                assert (await stub.GenerateOnce(request(max_tokens=1))).choices


async def test_operators_ask_for_the_status() -> None:
    async with open_door(FakeGroup(), operations=FakeOperations(), api_keys={"ops": "key-of-ops"}) as door:
        admin = admin_pb2_grpc.AdminStub(door.channel)
        answer = await admin.Status(admin_pb2.StatusRequest(), metadata=(("x-api-key", "key-of-ops"),))
        assert (answer.model, list(answer.warnings)) == ("fake", ["slow"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.Status(admin_pb2.StatusRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("name", ["gRPC", "HTTP"])
async def test_a_port_in_use_is_named(name: str) -> None:
    blocker = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = blocker.sockets[0].getsockname()[1]
    settings = FrontDoorSettings(
        front_door_id="test",
        secret=SECRET,
        grpc_port=port if name == "gRPC" else 0,
        http_port=port if name == "HTTP" else 0,
    )
    server = FrontDoorServer(settings, card=CARD, codec=ByteCodec())
    try:
        with pytest.raises(OSError, match=f"{name} port {port} on 127.0.0.1 cannot be opened"):
            await server.start()
    finally:
        await server.stop()
        blocker.close()
        await blocker.wait_closed()


async def test_a_door_can_wait_for_groups_before_it_opens() -> None:
    """A front door that shares its port and knows no group would turn away every second new client."""
    group = FakeGroup()
    settings = FrontDoorSettings(front_door_id="test", secret=SECRET, grpc_port=0, http_port=None)
    server = FrontDoorServer(settings, card=CARD, codec=ByteCodec())
    try:
        assert not await server.reach_groups(0.05), "it knows none"
        async with serving(group):
            server.set_groups([group.address])
            assert not server.ready(), "a stream takes its time"
            assert await server.reach_groups(20)
            assert server.ready()
            assert await server.reach_groups(0), "at once where one can be reached"
    finally:
        await server.stop()


def _by_reflection(target: str) -> list[dict[str, object]]:
    """What a client does that has no stubs of ours: it asks for the descriptors and builds the messages from them."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "shoal.v1.Inference" in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("shoal.v1.Inference").FindMethodByName("Generate")
        ask = message_factory.GetMessageClass(method.input_type)
        answer = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_stream(
            "/shoal.v1.Inference/Generate",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        message = json_format.ParseDict({"text": "hi", "sampling": {"max_tokens": 4, "seed": "3"}}, ask())
        return [json_format.MessageToDict(chunk) for chunk in call(message, timeout=20)]


async def test_a_client_with_nothing_but_reflection_works() -> None:
    async with open_door(FakeGroup()) as door:
        chunks = await asyncio.to_thread(_by_reflection, door.target)
        text = "".join(str(chunk.get("text", "")) for chunk in chunks)
        assert text == expected_text(HI, 3, 4)
        newer = door.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        listed = await newer.read()
        assert isinstance(listed, reflection_pb2.ServerReflectionResponse)
        assert "shoal.v1.Inference" in {service.name for service in listed.list_services_response.service}
        newer.cancel()


async def test_a_client_that_pings_keeps_its_quiet_stream() -> None:
    """With gRPC's defaults three pings within five minutes of silence end the connection (`too_many_pings`)."""
    group = FakeGroup()
    group.hold_at = 1
    pinging = [("grpc.keepalive_time_ms", 100), ("grpc.http2.max_pings_without_data", 0)]
    async with open_door(group) as door, grpc.aio.insecure_channel(door.target, options=pinging) as channel:
        stream = inference_pb2_grpc.InferenceStub(channel).Generate(request(max_tokens=2))
        await take(stream)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4):  # the silence is what is tested
                await asyncio.Event().wait()
        group.release()
        group.go_on()
        assert (await take(stream)).finish_reason == pb.FINISH_REASON_LENGTH
