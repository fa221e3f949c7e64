"""Priorities, deadlines, cached prefixes and tenants through the doors of a running server, its steps overlapped."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos.shoal.v1 import admin_pb2
from protos.shoal.v1 import inference_pb2 as pb
from tests.checkpoints import tiny_llama
from tests.integration.served import Served, eventually, serving

pytestmark = pytest.mark.timeout(240)

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob-too"}
CONFIG = f"""
inference: {{max_batch_size: 1}}
scheduling: {{overlap: true}}
security: {{api_key: {json.dumps(KEYS)}}}
"""
PROMPT = "A shoal is many small fish that move as one and close up when one is lost. " * 4
LONG = 12_000  # tokens of an answer that takes many seconds
SOON_S = 3.0  # far less, and far more than a refusal takes


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=16_384)
    with serving(folder, config=CONFIG) as server:
        for number in range(10):  # the group learns how long steps take, and how long answers get
            ask(server, f"{number} " * (8 * number + 1), max_tokens=20)
        yield server


def metadata(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {KEYS[tenant]}"),)


def generate(text: str, *, max_tokens: int, priority: int = 0) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    return pb.GenerateRequest(text=text, sampling=sampling, priority=priority)


def ask(
    served: Served, text: str, *, max_tokens: int, tenant: str = "alice", timeout_s: float = 60.0
) -> pb.GenerateResponse:
    request = generate(text, max_tokens=max_tokens)
    return served.inference.GenerateOnce(request, timeout=timeout_s, metadata=metadata(tenant))


def completion(served: Served, tenant: str, **body: object) -> tuple[int, dict[str, str], dict[str, object]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.http_port}/v1/completions",
        data=json.dumps({"model": "tiny", "ignore_eos": True, **body}).encode(),
        headers={"content-type": "application/json", "authorization": f"Bearer {KEYS[tenant]}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, dict(response.headers), json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), json.load(error)


@contextmanager
def busy(served: Served) -> Iterator[None]:
    """The only slot is taken by a long answer."""
    stream: Any = served.inference.Generate(generate("busy", max_tokens=LONG), timeout=600, metadata=metadata("alice"))
    assert next(iter(stream)).token_ids
    yield
    stream.cancel()


def group(served: Served) -> admin_pb2.DPGroupStatus:
    return served.status(api_key=KEYS["bob"]).engines[0].dp_groups[0]


def test_cached_tokens_are_told_and_tenants_do_not_share(served: Served) -> None:
    fresh, again = (ask(served, PROMPT, max_tokens=4) for _ in range(2))
    assert fresh.usage.cached_tokens == 0
    assert again.usage.cached_tokens >= 16
    assert again.usage.cached_tokens % 16 == 0, "whole blocks"
    assert list(again.choices[0].token_ids) == list(fresh.choices[0].token_ids)
    other = ask(served, PROMPT, max_tokens=4, tenant="bob")
    assert other.usage.cached_tokens == 0, "nobody learns what another has asked"
    status, _, answer = completion(served, "bob", prompt=PROMPT, max_tokens=4)
    assert status == 200
    usage = answer["usage"]
    assert isinstance(usage, dict)
    assert usage["prompt_tokens_details"] == {"cached_tokens": again.usage.cached_tokens}
    assert metric(served, 'shoal_cached_tokens_total{model_name="tiny"}') >= 2 * again.usage.cached_tokens
    hits = 'vllm:prefix_cache_hits_total{engine="engine-0/0",model_name="tiny"}'
    eventually(lambda: metric(served, hits) > 0, "the group's own count has come")


def metric(served: Served, name: str) -> float:
    """0 for one that is not there yet."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.http_port}/metrics", timeout=60) as response:
        metrics = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
    return float(metrics.get(name, 0))


def test_what_cannot_be_done_in_time_is_refused_at_once(served: Served) -> None:
    status, _, answer = completion(served, "alice", prompt="hi", max_tokens=LONG, timeout=SOON_S)
    assert status == 504
    assert "not to be done by its deadline: about" in json.dumps(answer)


def test_what_could_be_done_later_gets_a_hint(served: Served) -> None:
    with busy(served):
        with pytest.raises(grpc.RpcError) as caught:
            ask(served, "hi", max_tokens=8, timeout_s=SOON_S)
        status, headers, answer = completion(served, "bob", prompt="hi", max_tokens=8, timeout=SOON_S)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "are needed" in error.details()
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.RetryInfo()
    assert any(each.Unpack(info) for each in status_pb2.Status.FromString(packed).details)
    assert info.retry_delay.ToNanoseconds() > 0
    assert (status, int(headers["retry-after"]) >= 1) == (429, True)
    assert "are needed" in json.dumps(answer)


def test_an_urgent_request_goes_before_one_that_came_first(served: Served) -> None:
    classes = {"background": 5, "usual": 0, "urgent": -5}
    asked = []
    for name, priority in classes.items():
        request = generate(name, max_tokens=4, priority=priority)
        request.request_id = name
        asked.append(pb.SessionRequest(generate=request))
    with busy(served):
        session = served.inference.Session(iter(asked), timeout=600, metadata=metadata("bob"))
        eventually(lambda: group(served).num_waiting == len(classes), "they wait")
    began = dict.fromkeys(event.chunk.request_id for event in session)
    assert list(began) == ["urgent", "usual", "background"]
