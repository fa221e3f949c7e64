"""Every mistake gets OpenAI's error body, the right status, and a message that says what to change."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry

from cluster.front_door.errors import (
    WIRE,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    RequestError,
    Unauthenticated,
    Unavailable,
)
from cluster.front_door.http.app import build_app
from cluster.front_door.http.seam import HttpLimits
from tests.unit.cluster.http.fake_desk import FakeDesk

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "a"}


@pytest.fixture
def desk() -> FakeDesk:
    return FakeDesk()


@pytest.fixture
async def client(desk: FakeDesk) -> AsyncIterator[httpx.AsyncClient]:
    limits = HttpLimits(max_body_bytes=20_000, max_prompts=4, max_choices=8)
    app = build_app(desk, registry=CollectorRegistry(), limits=limits)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door") as client:
        yield client


def _error(answer: httpx.Response, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    error: dict[str, str] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("more", "param", "code", "says"),
    [
        ({"tempature": 1}, "tempature", "unknown_parameter", 'did you mean "temperature"?'),
        ({"xyzzy": 1}, "xyzzy", "unknown_parameter", "unknown field 'xyzzy'"),
        (
            {"stream_options": {"include_usag": True}},
            "stream_options.include_usag",
            "unknown_parameter",
            "include_usage",
        ),
        ({"temperature": "hot"}, "temperature", "invalid_type", "temperature must be a valid number, not 'hot'"),
        ({"temperature": "1"}, "temperature", "invalid_type", "not '1'"),
        ({"temperature": True}, "temperature", "invalid_type", "not True"),
        ({"temperature": -1}, "temperature", "invalid_value", "between 0 and 100"),
        ({"temperature": 1e9}, "temperature", "invalid_value", "between 0 and 100"),
        ({"top_p": 0}, "top_p", "invalid_value", "above 0"),
        ({"top_k": -2}, "top_k", "invalid_value", "top_k"),
        ({"top_k": 1.5}, "top_k", "invalid_type", "integer"),
        ({"min_p": 1.5}, "min_p", "invalid_value", "between 0 and 1"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value", "above 0"),
        ({"n": 0}, "n", "invalid_value", "between 1 and"),
        ({"n": 9}, "n", "invalid_value", "at most 8"),
        ({"n": 10**30}, "n", "invalid_value", "at most 8"),
        ({"n": -(10**30)}, "n", "invalid_value", "between 1 and"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "at least 1"),
        ({"max_tokens": 10**9}, "max_tokens", "invalid_value", "leaves room"),
        ({"max_tokens": 1.0}, "max_tokens", "invalid_type", "integer"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value", "between 0"),
        ({"seed": 2**64}, "seed", "invalid_value", "64 bits"),
        ({"logprobs": 1000}, "logprobs", "invalid_value", "between 0 and"),
        ({"logprobs": True}, "logprobs", "invalid_type", "integer"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "invalid_value", "between 0"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_type", "has a key that is no token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value", "token ids are 0 to 511"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "invalid_value", "between -100 and 100"),
        ({"stop": 5}, "stop", "invalid_type", "a string or a list of strings"),
        ({"stop": ["a", 5]}, "stop", "invalid_type", "a string or a list of strings"),
        ({"stop": ["x"] * 100}, "stop", "invalid_value", "at most"),
        ({"stop": ""}, "stop", "invalid_value", "characters"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value", "token ids are"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "invalid_type", "integer"),
        ({"priority": 10**30}, "priority", "invalid_value", "priority"),
        ({"request_id": "é"}, "request_id", "invalid_value", "printable ASCII"),
        ({"timeout": 0}, "timeout", "invalid_value", "greater than 0"),
        ({"model": "other"}, "model", "model_not_found", "'tiny' is"),
        ({"model": 5}, "model", "invalid_type", "string"),
        ({"stream": "yes"}, "stream", "invalid_type", "boolean"),
        ({"stream_options": {}}, "stream_options", "invalid_value", "needs stream"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter", "suffix is not supported yet"),
        ({"best_of": 3}, "best_of", "invalid_value", "unless it equals n"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'json_schema'"),
        ({"response_format": {"typ": "text"}}, "response_format.typ", "unknown_parameter", '"type"'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
            "response_format.json_schema.shema",
            "unknown_parameter",
            '"schema"',
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "invalid_value",
            "is required",
        ),
        ({"guided_json": 5}, "guided_json", "invalid_type", "must be a JSON schema"),
        ({"guided_choice": "yes"}, "guided_choice", "invalid_type", "valid array"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value", "send one of them"),
        ({"guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern", "invalid_value", "needs guided_json"),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value", "must name one of"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "unknown_parameter", '"json"'),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "unsupported_parameter",
            "not supported yet",
        ),
        ({"store": True}, "store", "unsupported_parameter", "not supported yet"),
        ({"length_penalty": True}, "length_penalty", "unsupported_parameter", "not supported yet"),
        ({"prompt": ""}, "prompt", "invalid_value", "at least one token"),
        ({"prompt": []}, "prompt", "invalid_value", "at least one token"),
        ({"prompt": None}, "prompt", "invalid_type", "must be a string, a list"),
        ({"prompt": 5}, "prompt", "invalid_type", "must be a string, a list"),
        ({"prompt": {"text": "a"}}, "prompt", "invalid_type", "must be a string, a list"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type", "must be a string, a list"),
        ({"prompt": [1.5]}, "prompt", "invalid_type", "must be a string, a list"),
        ({"prompt": [True]}, "prompt", "invalid_type", "must be a string, a list"),
        ({"prompt": [512]}, "prompt", "invalid_value", "prompt[0] is 512; token ids are 0 to 511"),
        ({"prompt": [-1]}, "prompt", "invalid_value", "token ids are 0 to 511"),
        ({"prompt": [[1], [2, 600]]}, "prompt", "invalid_value", "token ids are 0 to 511"),
        ({"prompt": [5] * 256}, "prompt", "invalid_value", "the model's length is 256"),
        ({"prompt": ["a"] * 5}, "prompt", "invalid_value", "5 prompts; at most 4"),
        ({"prompt": ["a"] * 4, "n": 3}, "n", "invalid_value", "12 choices; at most 8"),
        ({"add_special_tokens": False}, "add_special_tokens", "unsupported_parameter", "not supported yet"),
    ],
)
async def test_bad_completion(
    client: httpx.AsyncClient, more: dict[str, object], param: str, code: str, says: str
) -> None:
    for stream in (False, True):
        if "stream" in more or "stream_options" in more:
            stream = False
        body = {"prompt": "a", "stream": stream, **more}
        error = _error(await client.post(COMPLETIONS, json=body), 404 if code == "model_not_found" else 400)
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
        assert says in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "code", "says"),
    [
        ({}, "messages", "missing_required_parameter", "messages is required"),
        ({"prompt": "a"}, "prompt", "unknown_parameter", "unknown field 'prompt'"),
        ({"messages": []}, "messages", "invalid_value", "at least one message"),
        ({"messages": "hi"}, "messages", "invalid_type", "messages must be a valid"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type", "messages[0] must be"),
        ({"messages": [{"role": "user", "contnt": "a"}]}, "messages[0].contnt", "unknown_parameter", '"content"'),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing_required_parameter", "is required"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages[0].role", "invalid_value", "at least 1"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type", "must be a string"),
        ({"messages": [{"role": "bad", "content": "a"}]}, "messages", "invalid_value", "no such role"),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[1].content",
            "unsupported_parameter",
            "messages[1].content[0] has type 'image_url', which is not supported yet",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}]},
            "messages[0].content",
            "invalid_type",
            'messages[0].content[0] must be {"type": "text", "text": "..."}',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
            "messages[0].tool_calls is not supported yet",
        ),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "tools is not supp"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice", "unsupported_parameter", "not supported"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs", "invalid_value", "needs logprobs"),
        ({"messages": [USER], "logprobs": 2}, "logprobs", "invalid_type", "boolean"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": -1}, "top_logprobs", "invalid_value", "at least 0"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 99}, "logprobs", "invalid_value", "between 0 and"),
        (
            {"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2},
            "max_completion_tokens",
            "invalid_value",
            "differ",
        ),
        (
            {"messages": [USER], "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
            "invalid_value",
            "may not",
        ),
        ({"messages": [USER], "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "invalid_value", "may not"),
        ({"messages": [USER], "modalities": ["audio"]}, "modalities", "unsupported_parameter", "not supported"),
    ],
)
async def test_bad_chat(client: httpx.AsyncClient, body: dict[str, object], param: str, code: str, says: str) -> None:
    error = _error(await client.post(CHAT, json=body), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert says in error["message"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'["a"]', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8 at byte 12"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "finite"),
        (b'{"prompt": "a", "temperature": Infinity}', "finite"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite"),
        (b'{"prompt": "a", "logit_bias": {"5": NaN}}', "finite"),
        (b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", "not valid JSON"),
        (b'{"prompt": "a", "n": ' + b"9" * 9000 + b"}", "not valid JSON"),
    ],
)
async def test_bodies_that_are_no_json_of_ours(client: httpx.AsyncClient, content: bytes, says: str) -> None:
    answer = await client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert says in _error(answer, 400)["message"]


async def test_a_body_must_say_that_it_is_json(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        answer = await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
        assert _error(answer, 415)["code"] == "unsupported_media_type"
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert (await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)).status_code == 200
    assert len(desk.calls) == 1


async def test_a_body_over_the_limit_is_refused_declared_or_not(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    async def forever() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    for content in (b" " * 20_001, forever()):
        answer = await client.post(COMPLETIONS, content=content, headers=headers)
        assert _error(answer, 413)["code"] == "request_too_large"
        assert answer.headers["connection"] == "close"
    assert not desk.calls


async def test_unknown_places_and_wrong_methods(client: httpx.AsyncClient) -> None:
    assert _error(await client.get("/v1/nothing"), 404)["message"] == "there is no GET /v1/nothing"
    wrong = await client.get(COMPLETIONS)
    assert _error(wrong, 405)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"
    assert _error(await client.get("/v1/models/other"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
async def test_bad_timeout_header(client: httpx.AsyncClient, given: str) -> None:
    answer = await client.post(COMPLETIONS, json={"prompt": "a"}, headers={"X-Request-Timeout": given})
    assert _error(answer, 400)["param"] == "x-request-timeout"


async def test_bad_tokenize_and_detokenize(client: httpx.AsyncClient) -> None:
    both = {"prompt": "a", "messages": [USER]}
    for body in ({}, both):
        assert "exactly one" in _error(await client.post("/tokenize", json=body), 400)["message"]
    assert _error(await client.post("/tokenize", json={"prompt": "a", "model": "x"}), 404)["param"] == "model"
    reserved = {"messages": [USER], "chat_template_kwargs": {"add_generation_prompt": True}}
    assert _error(await client.post("/tokenize", json=reserved), 400)["param"] == "chat_template_kwargs"
    assert "0 to 511" in _error(await client.post("/detokenize", json={"tokens": [512]}), 400)["message"]
    assert _error(await client.post("/detokenize", json={"tokens": "a"}), 400)["code"] == "invalid_type"


@pytest.mark.parametrize("kind", WIRE)
async def test_errors_before_the_first_chunk_have_their_status(
    client: httpx.AsyncClient, desk: FakeDesk, kind: type[RequestError]
) -> None:
    desk.fail_with = kind("as you see", field="text", retry_after_s=1.5)
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": ["a", "b"], "stream": True}):
        answer = await client.post(COMPLETIONS, json=body)
        error = _error(answer, WIRE[kind].http)
        assert error == {
            "message": "as you see",
            "type": WIRE[kind].type,
            "param": "prompt",
            "code": WIRE[kind].code,
        }
        assert answer.headers["retry-after"] == "2"


async def test_errors_after_the_first_chunk_are_an_event(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    desk.fail_with, desk.fail_at = DeadlineExceeded("too late"), 2
    for prompt in ("a", ["a", "b"]):
        answer = await client.post(COMPLETIONS, json={"prompt": prompt, "stream": True})
        assert answer.status_code == 200
        *chunks, error, done, rest = answer.text.split("\n\n")
        assert chunks
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert (done, rest) == ("data: [DONE]", "")
    whole = await client.post(COMPLETIONS, json={"prompt": "a"})
    assert _error(whole, 504)["message"] == "too late"


@pytest.mark.parametrize("bad", [[600], [], "", [5] * 256, "the dog " * 200])
async def test_one_bad_prompt_of_several_is_found_before_any_is_run(
    client: httpx.AsyncClient, desk: FakeDesk, bad: object
) -> None:
    answer = await client.post(COMPLETIONS, json={"prompt": ["a", bad], "stream": True})
    assert _error(answer, 400)["param"] == "prompt"
    assert not desk.calls


async def test_what_nobody_foresaw_is_an_incident_and_nothing_else(
    client: httpx.AsyncClient, desk: FakeDesk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.fail_with = RuntimeError("at /secret/path")
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
        answer = await client.post(COMPLETIONS, json=body)
        message = _error(answer, 500)["message"]
        assert "secret" not in answer.text
        assert message.rpartition(" ")[2] in caplog.text
        assert "at /secret/path" in caplog.text
        assert answer.headers["x-should-retry"] == "false"
    desk.fail_at = 1
    answer = await client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert '"code":"internal_error"' in answer.text
    assert "secret" not in answer.text
    desk.fail_with = InternalError("internal error; incident 12")
    assert "incident 12" in _error(await client.post(COMPLETIONS, json={"prompt": "a"}), 500)["message"]


async def test_no_retry_is_asked_for_where_none_is_due(client: httpx.AsyncClient, desk: FakeDesk) -> None:
    for error in (Overloaded("full"), Unavailable("none")):
        desk.fail_with = error
        answer = await client.post(COMPLETIONS, json={"prompt": "a"})
        assert "retry-after" not in answer.headers
        assert answer.headers.get("connection") == ("close" if isinstance(error, Unavailable) else None)


async def test_keys() -> None:
    desk = FakeDesk()

    def authenticate(key: str) -> str:
        if key != "good":
            raise Unauthenticated("a valid API key is needed")
        return "ann"

    app = build_app(desk, registry=CollectorRegistry(), authenticate=authenticate)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door") as client:
        guarded = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
        for given in ("", "Bearer", "Bearer bad", "Basic good", "good"):
            headers = {"Authorization": given} if given else {}
            for path in guarded:
                answer = await client.post(path, content=b"not read", headers=headers)
                assert _error(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            for path in ("/v1/models", "/v1/models/tiny"):
                assert (await client.get(path, headers=headers)).status_code == 401
        for path in ("/", "/healthz", "/readyz", "/metrics"):
            assert (await client.get(path)).status_code == 200
        good = {"Authorization": "bearer good"}
        assert (await client.post(COMPLETIONS, json={"prompt": "a"}, headers=good)).status_code == 200
        assert (desk.calls[0].client, desk.calls[0].tenant) == ("ann", "ann")


async def test_the_id_of_an_event_must_fit_the_request(client: httpx.AsyncClient) -> None:
    key = {"Idempotency-Key": "k"}
    for headers, body, says in (
        ({"Last-Event-ID": "3"}, {"stream": True}, "needs the Idempotency-Key"),
        ({"Last-Event-ID": "-1", **key}, {"stream": True}, "must be the id of an event, such as 17, not '-1'"),
        ({"Last-Event-ID": "1,x", **key}, {"stream": True}, "must be the id of an event"),
        ({"Last-Event-ID": "3", **key}, {}, "needs stream to be true"),
        ({"Last-Event-ID": "3", **key}, {"stream": True, "n": 2}, "has 1 numbers, and the request has 2 choices"),
        ({"Last-Event-ID": "3", **key}, {"stream": True, "prompt": ["a", "b"]}, "is for one prompt, not 2"),
    ):
        error = _error(await client.post(COMPLETIONS, json={"prompt": "a", **body}, headers=headers), 400)
        assert error["param"] == "last-event-id"
        assert says in error["message"]
