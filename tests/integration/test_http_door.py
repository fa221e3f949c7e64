"""The `openai` client, as it is, against the HTTP door over a real socket, before a DP group that speaks the wire."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import httpx
import openai
import pytest

from cluster.front_door.server import FrontDoorServer, FrontDoorSettings
from tests.fakes import CARD, SECRET, ByteCodec, FakeGroup, LineTemplate, says, serving

T = TypeVar("T")
ANSWER = "A shoal of 🐟, naïvely."
KEY = "a client's key"


@pytest.fixture
async def group() -> AsyncIterator[FakeGroup]:
    group = FakeGroup(says(ANSWER))
    async with serving(group):
        yield group


@pytest.fixture
async def url(group: FakeGroup) -> AsyncIterator[str]:
    settings = FrontDoorSettings(front_door_id="door", secret=SECRET, grpc_port=0, http_port=0, api_keys={"ann": KEY})
    server = FrontDoorServer(settings, card=CARD, codec=ByteCodec(), template=LineTemplate())
    ready = asyncio.Event()
    server.desk.on_ready_change(ready.set)
    server.set_groups([group.address])
    await server.start()
    try:
        async with asyncio.timeout(20):
            while not server.ready():
                ready.clear()
                await ready.wait()
        yield f"http://127.0.0.1:{server.http_port}"
        assert server.num_open == 0
    finally:
        await server.stop()


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def _in_thread(url: str, use: Callable[[openai.OpenAI], T]) -> T:
    """With the synchronous client."""

    def run() -> T:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_chat(client: openai.AsyncOpenAI, group: FakeGroup) -> None:
    answer = await client.chat.completions.create(
        model="fake",
        messages=[{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}],
        temperature=0,
        seed=7,
        user="u",
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ANSWER.encode()) + 1
    assert bytes(i for i in group.submits[0].prompt_token_ids if i < 256) == b"system: brief\nuser: hi\nassistant: "
    assert group.submits[0].sampling.seed == 7


async def test_chat_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    texts = ["", ""]
    finishes: list[str | None] = [None, None]
    roles: list[str | None] = [None, None]
    num_logprobs = [0, 0]
    usage = None
    async for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            roles[choice.index] = choice.delta.role or roles[choice.index]
            if choice.logprobs is not None and choice.logprobs.content:
                num_logprobs[choice.index] += len(choice.logprobs.content)
                assert len(choice.logprobs.content[0].top_logprobs) == 2
        usage = event.usage or usage
        assert "\ufffd" not in "".join(texts)
    assert texts == [ANSWER, ANSWER]
    assert finishes == ["stop", "stop"]
    assert roles == ["assistant", "assistant"]
    assert usage is not None
    assert usage.completion_tokens == sum(num_logprobs) == 2 * (len(ANSWER.encode()) + 1)


async def test_the_synchronous_client(url: str) -> None:
    def use(client: openai.OpenAI) -> tuple[str, str, list[str]]:
        whole = client.completions.create(model="fake", prompt="hi", max_tokens=7)
        parts = client.completions.create(model="fake", prompt="hi", max_tokens=7, stream=True)
        return (
            whole.choices[0].text,
            "".join(part.choices[0].text for part in parts),
            [model.id for model in client.models.list()],
        )

    assert await _in_thread(url, use) == (ANSWER[:7], ANSWER[:7], ["fake"])


async def test_completions_with_everything(client: openai.AsyncOpenAI, group: FakeGroup) -> None:
    answer = await client.completions.create(
        model="fake-1b",
        prompt=["hi", "ho"],
        n=2,
        logprobs=1,
        echo=True,
        stop=["naïve", "zzz"],
        logit_bias={"5": -1},
        extra_body={"top_k": 3, "min_p": 0.1, "ignore_eos": True, "priority": -1, "return_token_ids": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    up_to_stop = ANSWER.partition("naïve")[0]
    assert [choice.text for choice in answer.choices] == [f"{p}{up_to_stop}" for p in ("hi", "hi", "ho", "ho")]
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert choice.model_extra is not None
        assert choice.model_extra["stop_reason"] == "naïve"
        assert bytes(choice.model_extra["prompt_token_ids"][1:]).decode() in ("hi", "ho")
        assert bytes(choice.model_extra["token_ids"]).decode() == up_to_stop + "naïve"
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
    assert len(group.submits) == 4
    assert len({submit.sampling.seed for submit in group.submits}) == 4
    assert group.submits[0].priority == -1


async def test_token_ids_in_and_a_stop_token(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="fake", prompt=[104, 105], extra_body={"stop_token_ids": [ord("s")]})
    assert answer.choices[0].text == "A "
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["stop_reason"] == ord("s")


@pytest.mark.parametrize(
    ("extra", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
        ({"extra_body": {"tempreture": 1}}, openai.BadRequestError, "tempreture"),
        ({"prompt": "x" * 600}, openai.BadRequestError, "prompt"),
        ({"prompt": [9999]}, openai.BadRequestError, "prompt"),
        ({"extra_headers": {"Authorization": "Bearer wrong"}}, openai.AuthenticationError, None),
        ({"extra_body": {"timeout": 0.05}, "prompt": "held"}, openai.InternalServerError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_clients_exceptions(
    client: openai.AsyncOpenAI,
    group: FakeGroup,
    extra: dict[str, object],
    kind: type[openai.APIStatusError],
    param: str | None,
    stream: bool,
) -> None:
    if extra.get("prompt") == "held":
        group.pause()
    arguments = {"model": "fake", "prompt": "hi", "stream": stream, **extra}
    with pytest.raises(kind) as raised:
        await client.completions.create(**arguments)  # type: ignore[call-overload]
    assert raised.value.param == param
    if kind is openai.InternalServerError:
        assert (raised.value.status_code, raised.value.code) == (504, "deadline_exceeded")


async def test_an_error_in_the_middle_of_a_stream(client: openai.AsyncOpenAI, group: FakeGroup) -> None:
    group.hold_at = 3
    stream = await client.completions.create(
        model="fake", prompt="hi", stream=True, extra_headers={"X-Request-Timeout": "2.0"}
    )
    texts: list[str] = []

    async def read() -> None:
        async for event in stream:
            texts.append(event.choices[0].text)

    with pytest.raises(openai.APIError, match="deadline"):
        await read()
    assert "".join(texts) == ANSWER[:3]


async def test_a_client_that_goes_away_ends_its_stream(client: openai.AsyncOpenAI, group: FakeGroup) -> None:
    group.hold_at = 2
    stream = await client.completions.create(model="fake", prompt=["hi", "ho"], n=2, stream=True)
    await anext(stream)
    await group.until(lambda group: group.num_running == 4)
    await stream.close()
    await group.until(lambda group: group.num_running == 0)
    assert len(group.cancels) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_before_the_first_token(url: str, group: FakeGroup, stream: bool) -> None:
    group.pause()
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "n": 3, "stream": stream}))
        await group.until(lambda group: group.num_running == 3)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
    await group.until(lambda group: group.num_running == 0)
    assert len(group.cancels) == 3


async def test_a_client_that_goes_away_in_the_middle_of_its_body(url: str, group: FakeGroup) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    writer.write(f'{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"prom'.encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/readyz")).status_code == 200
    assert not group.submits


async def test_one_event_for_each_message_of_the_group(url: str, group: FakeGroup) -> None:
    group.tokens_per_step = 4
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "hi", "stream": True, "max_tokens": 12, "return_token_ids": True}
    async with httpx.AsyncClient(base_url=url, headers=headers) as client:
        answer = await client.post("/v1/completions", json=body)
        metrics = (await client.get("/metrics")).text
    events = [line for line in answer.text.split("\n\n") if line.startswith("data: {")]
    ids = [json.loads(event.removeprefix("data: "))["choices"][0]["token_ids"] for event in events]
    assert [i for each in ids for i in each] == list(ANSWER.encode()[:12])
    assert len(events) <= 3  # a message holds four; what a busy reader finds waiting is merged
    assert "shoal_" in metrics
    assert "vllm:" in metrics
