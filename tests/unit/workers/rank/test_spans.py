"""The spans of a DP group, through the SDK that only the cluster installs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from scheduler.plan import Event, FinishReason
from scheduler.request import Request, SamplingParams
from workers import spans

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(spans, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def sequence() -> spans.SequenceSpans:
    request = Request(
        key="1:1",
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(),
        arrival_s=0.0,
        request_id="r1",
        traceparent=TRACEPARENT,
    )
    return spans.SequenceSpans(request, rank=2)


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_sequence_queues_prefills_and_decodes_without_gaps(exporter: InMemorySpanExporter) -> None:
    traced = sequence()
    traced.see(Event(key="1:1", position=0, token_id=5, queue_s=0.5, prefill_s=0.25, num_cached_tokens=1))
    traced.see(Event(key="1:1", position=1, token_id=6))
    traced.see(Event(key="1:1", position=2, token_id=7, finish=FinishReason.LENGTH))
    queue, prefill, decode = exporter.get_finished_spans()
    assert [span.name for span in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert seconds(queue) == pytest.approx(0.5)
    assert seconds(prefill) == pytest.approx(0.25)
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    for span in (queue, prefill, decode):
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}" == TRACE_ID
        assert f"{span.parent.span_id:016x}" == PARENT_ID
        assert span.attributes is not None
        assert span.attributes["shoal.request_id"] == "r1"
    assert prefill.attributes is not None
    assert prefill.attributes["gen_ai.usage.input_tokens"] == 3
    assert decode.attributes is not None
    assert decode.attributes["gen_ai.usage.output_tokens"] == 3
    assert decode.attributes["gen_ai.response.finish_reasons"] == ("length",)


def test_one_that_never_ran_only_queued(exporter: InMemorySpanExporter) -> None:
    sequence().see(Event(key="1:1", position=0, finish=FinishReason.DEADLINE))
    (queue,) = exporter.get_finished_spans()
    assert queue.name == "queue"


def test_a_step_belongs_to_the_trace(exporter: InMemorySpanExporter) -> None:
    spans.record_step(TRACEPARENT, rank=1, step=9, num_tokens=64, num_sequences=2, start_ns=1)
    (step,) = exporter.get_finished_spans()
    assert step.name == "step"
    assert step.attributes is not None
    assert step.attributes["shoal.rank"] == 1
    assert f"{step.context.trace_id:032x}" == TRACE_ID
