"""The default model, guided, through both doors: whatever it would rather say, it says what it must."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest

from cluster.config.environment import cache_folder
from cluster.models import catalog, registry
from protos.shoal.v1 import inference_pb2 as pb
from tests.integration.served import Served, serving

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PROMPT = "Describe a person as JSON."


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    # Small chunks: most prompts take several steps while others decode.
    with serving(
        catalog.pull(registry.DEFAULT, cache_folder()),
        config="inference: {dtype: float32, max_model_len: 512, max_batch_tokens: 24, max_batch_size: 16}\n",
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.http_port}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(served: Served, guided: pb.GuidedDecoding | None, text: str = PROMPT, **sampling: Any) -> pb.GenerateResponse:
    params = pb.SamplingParams(guided=guided, **{"temperature": 1.0, "max_tokens": 200, **sampling})
    return served.inference.GenerateOnce(pb.GenerateRequest(text=text, sampling=params), timeout=120)


def test_a_schema_over_grpc_for_each_of_several_choices(served: Served) -> None:
    answer = say(served, pb.GuidedDecoding(json_schema=json.dumps(SCHEMA)), n=4, seed=1)
    texts = [choice.text for choice in answer.choices]
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMA)
        assert choice.finish_reason == pb.FINISH_REASON_STOP
    assert len(set(texts)) == 4, "each has its own noise and its own place"


@pytest.mark.parametrize(
    ("guided", "pattern"),
    [
        (pb.GuidedDecoding(regex=r"\d{3}-\d{4}"), r"\d{3}-\d{4}"),
        (pb.GuidedDecoding(choice=pb.GuidedDecoding.Choices(texts=["yes", "no", "perhaps"])), "yes|no|perhaps"),
        (pb.GuidedDecoding(grammar='start: "a" (" and " "a")~1..3'), "a( and a){1,3}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_notations_over_grpc(served: Served, guided: pb.GuidedDecoding, pattern: str) -> None:
    (choice,) = say(served, guided, temperature=0.0).choices
    assert re.fullmatch(pattern, choice.text)
    assert choice.finish_reason == pb.FINISH_REASON_STOP


def test_the_openai_client_gets_its_response_format(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=200,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}},
    )
    choice = answer.choices[0]
    jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    assert choice.finish_reason == "stop"


def test_a_stream_of_a_json_object_is_the_beginning_of_one(client: openai.OpenAI) -> None:
    parts = client.completions.create(
        model="smollm2-135m",
        prompt=PROMPT,
        max_tokens=40,
        temperature=0.0,
        stream=True,
        extra_body={"response_format": {"type": "json_object"}},
    )
    text = "".join(part.choices[0].text for part in parts)
    assert text.startswith("{")
    json.loads(text if text.endswith("}") else json.dumps(text))


def test_how_it_combines_with_what_else_ends_an_output(served: Served) -> None:
    digits = pb.GuidedDecoding(regex="[0-9]*")
    (plain,) = say(served, digits, temperature=0.0, max_tokens=12, ignore_eos=True).choices
    assert plain.finish_reason == pb.FINISH_REASON_LENGTH, "the end is ignored where the grammar may go on"
    assert plain.text.isdigit()
    (early,) = say(served, digits, temperature=0.0, max_tokens=12, min_tokens=6).choices
    assert len(early.token_ids) >= 6
    (cut,) = say(served, pb.GuidedDecoding(regex="one two three"), stop=["two"]).choices
    assert cut.text == "one "
    assert cut.stop_string == "two"
    (short,) = say(served, pb.GuidedDecoding(regex="one"), min_tokens=20, ignore_eos=True, logprobs=1).choices
    assert (short.text, short.finish_reason) == ("one", pb.FINISH_REASON_STOP), "the grammar has the last word"
    assert len(short.logprobs) == len(short.token_ids)


def test_a_crowd_of_guided_and_plain_ones(served: Served) -> None:
    """Each says what it says alone."""
    guides = [None, pb.GuidedDecoding(json_schema=json.dumps(SCHEMA)), pb.GuidedDecoding(regex="[a-z ]{5,30}[.]"), None]
    asks = [(guide, f"{PROMPT} Number {at}." * (1 + at % 3)) for at, guide in enumerate(guides * 2)]

    def ask(at: int) -> str:
        guide, text = asks[at]
        return say(served, guide, text, temperature=0.0, max_tokens=30).choices[0].text

    alone = [ask(at) for at in range(len(asks))]
    with ThreadPoolExecutor(len(asks)) as pool:
        assert list(pool.map(ask, range(len(asks)))) == alone
