"""Guided decoding at both doors: what reaches a DP group, and what is refused before anything does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos.shoal.v1 import inference_pb2 as pb
from tests.fakes import VOCAB_SIZE, FakeGroup, says
from tests.integration.doors import Door, open_door, request, rest
from tests.unit.cluster.tiny_tokenizers import byte_level
from workers.guided import GrammarCompiler

TOKENS = byte_level().get_vocab_size() + VOCAB_SIZE


@pytest.fixture
async def group() -> FakeGroup:
    return FakeGroup(says("ok"))


@pytest.fixture
async def door(group: FakeGroup) -> AsyncIterator[Door]:
    async with open_door(group, http=True, grammars=GrammarCompiler(byte_level().to_str(), TOKENS)) as door:
        yield door


async def post(door: Door, **body: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.server.http_port}") as client:
        return await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4, **body})


GUIDES = [
    pb.GuidedDecoding(json_schema='{"type": "integer"}'),
    pb.GuidedDecoding(json_object=True, whitespace_pattern="[ ]{0,2}"),
    pb.GuidedDecoding(regex="[a-z]+"),
    pb.GuidedDecoding(choice=pb.GuidedDecoding.Choices(texts=["é", 'a"b'])),
    pb.GuidedDecoding(grammar='start: "ok"'),
]


@pytest.mark.parametrize("guided", GUIDES, ids=lambda guided: guided.WhichOneof("guide"))
async def test_what_a_grpc_client_asks_for_reaches_every_choice(
    door: Door, group: FakeGroup, guided: pb.GuidedDecoding
) -> None:
    await door.stub.GenerateOnce(request(guided=guided, n=2, max_tokens=4))
    assert [submit.sampling.guided for submit in group.submits] == [guided, guided]


@pytest.mark.parametrize(
    ("body", "guided"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, pb.GuidedDecoding(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "description": "d", "schema": {"type": "null"}},
                }
            },
            pb.GuidedDecoding(json_schema='{"type": "null"}'),
        ),
        ({"guided_json": {"type": "null"}}, pb.GuidedDecoding(json_schema='{"type": "null"}')),
        (
            {"guided_json": '{"type":"null"}', "guided_whitespace_pattern": " ?"},
            pb.GuidedDecoding(json_schema='{"type":"null"}', whitespace_pattern=" ?"),
        ),
        ({"guided_regex": "a+"}, pb.GuidedDecoding(regex="a+")),
        ({"guided_choice": ["a", "b"]}, pb.GuidedDecoding(choice=pb.GuidedDecoding.Choices(texts=["a", "b"]))),
        ({"guided_grammar": 'root ::= "a"'}, pb.GuidedDecoding(grammar='root ::= "a"')),
        ({"structured_outputs": {"json": {"type": "null"}}}, pb.GuidedDecoding(json_schema='{"type": "null"}')),
        ({"structured_outputs": {"json_object": True}}, pb.GuidedDecoding(json_object=True)),
        (
            {"structured_outputs": {"regex": "a+", "disable_any_whitespace": False, "whitespace_pattern": None}},
            pb.GuidedDecoding(regex="a+"),
        ),
    ],
    ids=str,
)
async def test_what_an_http_client_asks_for_reaches_the_group(
    door: Door, group: FakeGroup, body: dict[str, object], guided: pb.GuidedDecoding | None
) -> None:
    answer = await post(door, **body)
    assert answer.status_code == 200, answer.text
    sampling = group.submits[0].sampling
    assert (sampling.guided if sampling.HasField("guided") else None) == guided


async def test_a_bad_grammar_is_refused_before_any_work(door: Door, group: FakeGroup) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rest(door.stub.Generate(request(guided=pb.GuidedDecoding(regex="a("))))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "sampling.guided.regex cannot be used" in (caught.value.details() or "")
    assert "unclosed group" in (caught.value.details() or "")
    metadata: Any = caught.value.trailing_metadata()  # pairs, whatever the stubs say
    status = status_pb2.Status.FromString(dict(metadata)["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == "sampling.guided.regex"

    answer = await post(door, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "tea"}}})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_value")
    assert error["param"] == "response_format.json_schema.schema"
    assert "Invalid type: tea" in error["message"]
    assert group.submits == []
    assert door.server.num_open == 0


async def test_nothing_asked_for_is_named(door: Door) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="must name one of json_schema"):
        await door.stub.GenerateOnce(request(guided=pb.GuidedDecoding()))


async def test_an_error_of_the_group_reaches_the_client_and_is_not_tried_again(door: Door, group: FakeGroup) -> None:
    group.invalid = "the grammar leads nowhere"
    with pytest.raises(grpc.aio.AioRpcError, match="the grammar leads nowhere") as caught:
        await door.stub.GenerateOnce(request(guided=pb.GuidedDecoding(regex="a+")))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(group.submits) == 1


async def test_a_model_without_a_readable_tokenizer_says_so(group: FakeGroup) -> None:
    async with open_door(group) as door:
        with pytest.raises(grpc.aio.AioRpcError, match=r"no tokenizer\.json"):
            await door.stub.GenerateOnce(request(guided=pb.GuidedDecoding(regex="a+")))
