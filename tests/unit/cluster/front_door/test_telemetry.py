"""What a call leaves behind: a span, and numbers under both families of names."""

from __future__ import annotations

import re

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import generate_latest

from cluster.front_door.call import Call, Message, SamplingOptions
from cluster.front_door.distribution import Distribution
from cluster.front_door.errors import InvalidRequest
from protos.shoal.v1 import session_pb2 as pb
from tests.unit.cluster.front_door.support import Bench, bench, turns

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def _traced(exporter: InMemorySpanExporter) -> Bench:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    it = bench(("engine/0",))
    it.desk._tracer = provider.get_tracer("test")
    return it


async def _answered(it: Bench, call: Call) -> pb.Submit:
    task, (submit,) = await it.begin(call)
    it.clock.advance(0.5)
    first = pb.SequenceOutput(
        sequence_id=submit.sequence_id, token_ids=b"a", queue_s=0.25, prefill_s=0.125, num_cached_tokens=2
    )
    it.link().say(first)
    it.clock.advance(0.05)
    it.link().say(
        pb.SequenceOutput(sequence_id=submit.sequence_id, position=1, token_ids=b"b", finish=pb.FINISH_LENGTH)
    )
    await task
    return submit


async def test_a_span_continues_the_clients_trace(exporter: InMemorySpanExporter) -> None:
    it = _traced(exporter)
    call = Call(
        messages=(Message("user", "hi"),),
        request_id="r",
        traceparent=PARENT,
        door="grpc",
        sampling=SamplingOptions(temperature=0.5, max_tokens=2, seed=4, stop=("x",)),
    )
    submit = await _answered(it, call)
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind) == ("chat fake", SpanKind.SERVER)
    assert span.parent is not None
    assert span.context is not None
    assert format(span.parent.span_id, "016x") == "b7ad6b7169203331"
    assert submit.traceparent == f"00-0af7651916cd43dd8448eb211c80319c-{span.context.span_id:016x}-01"
    attributes = dict(span.attributes or {})
    expected: dict[str, object] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "fake",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.stop_sequences": ("x",),
        "gen_ai.response.id": "r",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.response.time_to_first_chunk": 0.5,
    }
    assert {name: attributes.get(name) for name in expected} == expected


async def test_an_error_shows_in_the_span(exporter: InMemorySpanExporter) -> None:
    it = _traced(exporter)
    with pytest.raises(InvalidRequest):
        await anext(it.desk.open(Call(text="x", sampling=SamplingOptions(n=99))))
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "invalid_value"


async def test_without_an_sdk_the_clients_context_is_passed_on() -> None:
    it = bench(("engine/0",))
    for given, passed in ((PARENT, PARENT), ("", "")):
        task, (submit,) = await it.begin(Call(text="x", traceparent=given))
        assert submit.traceparent == passed
        task.cancel()
        await turns()


async def test_the_numbers_of_a_call_under_both_names() -> None:
    it = bench(("engine/0",))
    await _answered(it, Call(text="hi", door="http"))
    for prefix, whole in (("shoal_", "request_seconds"), ("vllm:", "e2e_request_latency_seconds")):
        assert it.value(f"{prefix}prompt_tokens_total") == 3
        assert it.value(f"{prefix}generation_tokens_total") == 2
        assert it.value(f"{prefix}time_to_first_token_seconds_sum") == pytest.approx(0.5)
        assert it.value(f"{prefix}time_to_first_token_seconds_bucket", le="0.25") == 0
        assert it.value(f"{prefix}time_to_first_token_seconds_bucket", le="0.5") == 1
        assert it.value(f"{prefix}inter_token_latency_seconds_sum") == pytest.approx(0.05)
        assert it.value(f"{prefix}{whole}_count") == 1
    assert it.value("vllm:request_queue_time_seconds_sum") == 0.25
    assert it.value("vllm:request_prefill_time_seconds_sum") == 0.125
    assert it.value("vllm:request_time_per_output_token_seconds_sum") == pytest.approx(0.05)
    assert it.value("vllm:request_success_total", finished_reason="length") == 1
    assert it.value("shoal_requests_total", door="http", code="ok") == 1
    assert it.value("shoal_cached_tokens_total") == 2
    assert it.value("shoal_open_requests") == 0


async def test_errors_are_counted_by_door_and_code() -> None:
    it = bench(("engine/0",))
    for door in ("grpc", "grpc", "http"):
        with pytest.raises(InvalidRequest):
            await anext(it.desk.open(Call(text="", token_ids=(), door=door)))
    assert it.value("shoal_errors_total", door="grpc", code="invalid_value") == 2
    assert it.value("shoal_errors_total", door="http", code="invalid_value") == 1
    assert it.value("shoal_open_requests") == 0


async def test_groups_report_their_load() -> None:
    it = bench()
    load = pb.Load(num_running=3, num_waiting=2, num_free_blocks=25, num_blocks=100, num_preemptions=4)
    load.prefix_query_tokens, load.prefix_hit_tokens = 10, 7
    it.link(1)._receive(pb.Downlink(generation=1, load=load))
    for name, value in (
        ("vllm:num_requests_running", 3),
        ("vllm:num_requests_waiting", 2),
        ("vllm:kv_cache_usage_perc", 0.75),
        ("vllm:num_preemptions_total", 4),
        ("vllm:prefix_cache_queries_total", 10),
        ("vllm:prefix_cache_hits_total", 7),
    ):
        assert it.value(name, engine="engine/1") == value
    it.link(0).down()
    assert it.value("shoal_group_ready", engine="engine/0") == 0
    assert it.value("shoal_streams_lost_total", engine="engine/0") == 1


async def test_the_exposition_is_well_formed() -> None:
    it = bench()
    await _answered(it, Call(text="hi"))
    text = generate_latest(it.registry).decode()
    names = re.findall(r"^# TYPE (\S+)", text, flags=re.MULTILINE)
    assert len(names) == len(set(names)) > 30


def test_a_distribution_counts_like_prometheus() -> None:
    distribution = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        distribution.observe(value)
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in distribution.family("d", "", {"model_name": "m"}).samples
    }
    assert samples[("d_bucket", "1.0")] == 2
    assert samples[("d_bucket", "2.0")] == 3
    assert samples[("d_bucket", "+Inf")] == samples[("d_count", None)] == distribution.count == 4
    assert samples[("d_sum", None)] == 102.0
