"""What the endpoints answer when all is well."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster.front_door.http.app import build_app
from tests.unit.cluster.http.fake_desk import REPLY, FakeDesk

Json = dict[str, object]


@pytest.fixture
def desk() -> FakeDesk:
    return FakeDesk()


@pytest.fixture
async def client(desk: FakeDesk) -> AsyncIterator[httpx.AsyncClient]:
    registry = CollectorRegistry()
    Counter("shoal_blubs", "Blubs.", registry=registry).inc(3)
    app = build_app(desk, registry=registry, cors_origin=["https://page.example"], clock=lambda: 1234.5)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door") as client:
        yield client


async def _events(client: httpx.AsyncClient, path: str, body: Json) -> list[dict[str, object]]:
    answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_a_completion(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    body = {"model": "alias", "prompt": "the dog", "user": "me", "metadata": {"a": "b"}, "request_id": "mine"}
    answer = (await client.post("/v1/completions", json=body)).json()
    num_tokens = len(desk.codec.encode(REPLY))
    assert answer == {
        "id": "mine",
        "object": "text_completion",
        "created": 1234,
        "model": "tiny",
        "choices": [{"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": len(desk.codec.encode("the dog")),
            "completion_tokens": num_tokens,
            "total_tokens": len(desk.codec.encode("the dog")) + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_a_chat_completion(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": parts, "name": "ann"}]
    answer = (await client.post("/v1/chat/completions", json={"messages": messages})).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert desk.calls[0].messages is not None
    assert [(m.role, m.content, m.name) for m in desk.calls[0].messages] == [
        ("system", "brief", ""),
        ("user", "a\nb", "ann"),
    ]
    assert desk.calls[0].request_id == answer["id"]


async def test_every_sampling_field_reaches_the_desk(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "seed": 11,
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "n": 2,
        "logprobs": 3,
        "prompt_logprobs": 1,
    }
    body = {**sampling, "logit_bias": {"5": -100}, "stop": "x", "stop_token_ids": [4], "priority": -3}
    assert (await client.post("/v1/completions", json={**body, "prompt": "a"})).status_code == 200
    call = desk.calls[0]
    assert {name: getattr(call.sampling, name) for name in sampling} == sampling
    assert call.sampling.logit_bias == {5: -100.0}
    assert call.sampling.stop == ("x",)
    assert call.sampling.stop_token_ids == (4,)
    assert (call.priority, call.door, call.text) == (-3, "http", "a")
    chat = {"messages": [{"role": "user", "content": "a"}], "stop": ["x", "y"], "max_completion_tokens": 5}
    more = {"logprobs": True, "top_logprobs": 4, "chat_template_kwargs": {"k": 1}, "add_generation_prompt": False}
    assert (await client.post("/v1/chat/completions", json={**chat, **more})).status_code == 200
    call = desk.calls[1]
    assert call.sampling.stop == ("x", "y")
    assert (call.sampling.max_tokens, call.sampling.logprobs) == (5, 4)
    assert (call.chat_template_kwargs, call.add_generation_prompt) == ({"k": 1}, False)


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("a", ["a"]),
        ([5, 6], [(5, 6)]),
        (["a", "b"], ["a", "b"]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ],
)
async def test_every_form_of_prompt_and_the_choices_numbers(
    client: httpx.AsyncClient, desk: FakeDesk, prompt: object, seen: list[object]
) -> None:
    body = {"prompt": prompt, "n": 2, "return_token_ids": True}
    answer = (await client.post("/v1/completions", json=body)).json()
    ids_seen = [tuple(desk.codec.encode(each)) if isinstance(each, str) else each for each in seen]
    assert [call.token_ids or tuple(desk.codec.encode(call.text or "")) for call in desk.calls] == ids_seen
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(seen)))
    assert [choice["text"] for choice in answer["choices"]] == [REPLY, REPLY + "!"] * len(seen)
    for choice in answer["choices"]:
        assert desk.codec.decode(choice["token_ids"], True) == choice["text"]
        asked = seen[choice["index"] // 2]
        ids = list(asked) if isinstance(asked, tuple) else desk.codec.encode(str(asked))
        assert choice["prompt_token_ids"] == ids
    assert len({call.request_id for call in desk.calls}) == len(seen)
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])


@pytest.mark.parametrize("extra", [{}, {"return_token_ids": True}, {"logprobs": 1}])
async def test_a_completions_events_say_what_the_whole_says(
    client: httpx.AsyncClient, desk: FakeDesk, extra: Json
) -> None:
    body = {"prompt": ["the dog", [5, 6]], "n": 2, "stream_options": {"include_usage": True}, **extra}
    events = await _events(client, "/v1/completions", body)
    del body["stream_options"]
    whole = (await client.post("/v1/completions", json=body)).json()
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert {(event["id"], event["model"], event["created"]) for event in events} == {(events[0]["id"], "tiny", 1234)}
    assert len(events) == 1 + whole["usage"]["completion_tokens"]  # one for each token of the fake
    for expected in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == expected["index"]]  # type: ignore[attr-defined]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [expected["finish_reason"]]
        if "return_token_ids" in extra:
            assert [i for part in parts for i in part["token_ids"]] == expected["token_ids"]
            assert parts[0]["prompt_token_ids"] == expected["prompt_token_ids"]
            assert all("prompt_token_ids" not in part for part in parts[1:])
        if "logprobs" in extra:
            for name, value in expected["logprobs"].items():
                assert [each for part in parts for each in part["logprobs"][name]] == value


@pytest.mark.parametrize("extra", [{}, {"return_token_ids": True}, {"logprobs": True, "top_logprobs": 2}])
async def test_a_chats_events_say_what_the_whole_says(client: httpx.AsyncClient, extra: Json) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, **extra}
    events = await _events(client, "/v1/chat/completions", body)
    whole = (await client.post("/v1/chat/completions", json=body)).json()
    assert all("usage" not in event for event in events)
    for expected in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == expected["index"]]  # type: ignore[attr-defined]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in part["delta"] for part in parts[1:])
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == expected["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [expected["finish_reason"]]
        if "return_token_ids" in extra:
            assert [i for part in parts for i in part.get("token_ids", [])] == expected["token_ids"]
            assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"] == expected["prompt_token_ids"]
        if "logprobs" in extra:
            content = [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]]
            assert content == expected["logprobs"]["content"]


async def test_usage_on_every_event(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await _events(client, "/v1/completions", {"prompt": "the", "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]  # type: ignore[index]
    num_tokens = len(desk.codec.encode(REPLY))
    assert counts == [*range(1, num_tokens + 1), num_tokens]
    assert {event["usage"]["prompt_tokens"] for event in events} == {len(desk.codec.encode("the"))}  # type: ignore[index]


async def test_completion_logprobs(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    answer = (await client.post("/v1/completions", json={"prompt": "a", "logprobs": 2})).json()
    logprobs = answer["choices"][0]["logprobs"]
    ids = desk.codec.encode(REPLY)
    assert set(logprobs["token_logprobs"]) == {-0.5}
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])  # two alternatives and the chosen one
    # A token that is part of a character is told by its bytes, and begins where the text before it ends.
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    assert b"".join(map(_spelled_bytes, logprobs["tokens"])).decode() == REPLY
    assert len(logprobs["tokens"]) == len(ids)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert REPLY[offset:].startswith(token)


def _spelled_bytes(token: str) -> bytes:
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


async def test_chat_logprobs(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == REPLY
    assert all(len(each["top_logprobs"]) == 2 and each["logprob"] == -0.5 for each in content)
    assert answer["prompt_logprobs"][0] is None
    second = desk.codec.encode("<user>a<assistant>", False)[1]
    assert answer["prompt_logprobs"][1][str(second)]["rank"] == 3
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "return_tokens_as_token_ids": True}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    tokens = [each["token"] for each in answer["choices"][0]["logprobs"]["content"]]
    assert tokens == [f"token_id:{i}" for i in desk.codec.encode(REPLY)]


@pytest.mark.parametrize("prompt", ["the dog", [260, 5, 6]])
async def test_echo_puts_the_prompt_in_front(
    client: httpx.AsyncClient, desk: FakeDesk, prompt: str | list[int]
) -> None:
    text = prompt if isinstance(prompt, str) else desk.codec.decode(prompt, True)
    body: Json = {"prompt": prompt, "echo": True, "logprobs": 1, "n": 2}
    choices = (await client.post("/v1/completions", json=body)).json()["choices"]
    ids = desk.codec.encode(prompt) if isinstance(prompt, str) else prompt
    for choice in choices:
        assert choice["text"].startswith(text + REPLY)
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert len(choice["logprobs"]["tokens"]) == len(ids) + len(desk.codec.encode(choice["text"][len(text) :]))
        assert choice["logprobs"]["text_offset"][len(ids)] == len(text)
    events = await _events(client, "/v1/completions", body)
    first = [c for e in events for c in e["choices"] if c["index"] == 1]  # type: ignore[attr-defined]
    assert "".join(part["text"] for part in first) == choices[1]["text"]
    assert [i for part in first for i in part["logprobs"]["text_offset"]] == choices[1]["logprobs"]["text_offset"]


async def test_echo_without_new_tokens_scores_the_prompt(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    body = {"prompt": "the dog", "echo": True, "logprobs": 1, "max_tokens": 0, "return_token_ids": True}
    answer = (await client.post("/v1/completions", json=body)).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("the dog", "length", [])
    assert len(choice["logprobs"]["tokens"]) == len(desk.codec.encode("the dog")) == answer["usage"]["total_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_of_completions_are_each_choices_own(client: httpx.AsyncClient) -> None:
    body = {"prompt": [5, 6, 7], "prompt_logprobs": 1, "n": 2}
    for choice in (await client.post("/v1/completions", json=body)).json()["choices"]:
        assert [entry and sorted(entry) for entry in choice["prompt_logprobs"]] == [None, ["5", "6"], ["6", "7"]]


async def test_headers_reach_the_call_and_come_back(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    headers = {"X-Request-Id": "abc", "traceparent": "00-1-2-01", "X-Request-Timeout": "2.5"}
    answer = await client.post("/v1/completions", json={"prompt": "a", "timeout": 10}, headers=headers)
    assert answer.headers["x-request-id"] == "abc"
    assert (desk.calls[0].traceparent, desk.calls[0].timeout_s) == ("00-1-2-01", 2.5)
    for given in ("", "x" * 500, "\x7f"):
        answer = await client.get("/healthz", headers={"X-Request-Id": given})
        assert answer.headers["x-request-id"].startswith("req-")


async def test_what_is_left_out_is_not_asked_for(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    await client.post("/v1/completions", json={"prompt": "a", "temperature": None, "stop": None, "n": None})
    call = desk.calls[0]
    assert all(getattr(call.sampling, name) is None for name in ("temperature", "n", "max_tokens", "seed", "top_k"))
    assert (call.sampling.stop, call.timeout_s, call.priority) == ((), None, 0)


async def test_harmless_values_of_what_is_not_served_are_taken(client: httpx.AsyncClient) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None}
    more = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    body = {"messages": [message, {"role": "user", "content": "a"}], **more, "service_tier": "auto"}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    answer = await client.post("/v1/completions", json={"prompt": "a", "suffix": "", "best_of": 1, "length_penalty": 1})
    assert answer.status_code == 200, answer.text


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    one = (await client.get("/v1/models/tiny")).json()
    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["object"], one["created"], one["max_model_len"]) == ("tiny", "model", 1_700_000_000, 256)


async def test_tokenize_and_back(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    answer = (await client.post("/tokenize", json={"prompt": REPLY, "return_token_strs": True})).json()
    ids = desk.codec.encode(REPLY)
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), 256)
    assert answer["token_strs"][0] == desk.codec.decode(ids[:1], True)
    assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": REPLY}
    chat = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}
    answer = (await client.post("/tokenize", json=chat)).json()
    assert desk.codec.decode(answer["tokens"], True) == "<user>a"


async def test_health_readiness_metrics_and_landing(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).status_code == 200
    desk.is_ready = False
    not_ready = await client.get("/readyz")
    assert not_ready.status_code == 503
    assert "no DP group is ready" in not_ready.json()["reason"]
    metrics = await client.get("/metrics")
    assert "shoal_blubs_total 3.0" in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain")
    landing = await client.get("/")
    assert "/v1/chat/completions" in landing.text
    assert "text/html" in landing.headers["content-type"]


async def test_pages_of_the_named_origin_may_call(client: httpx.AsyncClient) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    ours = await client.options("/v1/completions", headers={"Origin": "https://page.example", **preflight})
    assert ours.headers["access-control-allow-origin"] == "https://page.example"
    other = await client.options("/v1/completions", headers={"Origin": "https://other.example", **preflight})
    assert "access-control-allow-origin" not in other.headers
    failed = await client.post("/v1/completions", json={}, headers={"Origin": "https://page.example"})
    assert failed.status_code == 400
    assert failed.headers["access-control-allow-origin"] == "https://page.example"
