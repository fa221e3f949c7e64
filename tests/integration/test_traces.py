"""One trace from the client's traceparent through the front door to every rank, as a collector hears it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from protos.shoal.v1 import inference_pb2
from tests.checkpoints import tiny_llama
from tests.integration.served import eventually, serving

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@dataclass(frozen=True, slots=True)
class Span:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, AnyValue]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.spans: list[Span] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                names = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
                self.spans.extend(
                    Span(
                        names["service.name"],
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        {entry.key: entry.value for entry in span.attributes},
                    )
                    for scope in resource.scope_spans
                    for span in scope.spans
                )
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, int]]:
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, port
    server.stop(0).wait()


def test_one_trace_reaches_every_rank(tmp_path: Path, collector: tuple[Collector, int]) -> None:
    heard, port = collector
    model = tiny_llama(tmp_path / "tiny")
    config = f"telemetry: {{otlp_endpoint: 'http://127.0.0.1:{port}'}}\n"
    with serving(model, "--tensor", "2", config=config) as served:
        request = inference_pb2.GenerateRequest(
            text="A shoal is", sampling=inference_pb2.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        )
        served.inference.GenerateOnce(request, timeout=60, metadata=(("traceparent", TRACEPARENT),))

        def ranks() -> set[int]:
            steps = [span for span in heard.spans if span.trace_id == TRACE_ID and span.name == "step"]
            return {span.attributes["shoal.rank"].int_value for span in steps}

        def names() -> set[str]:
            return {span.name for span in heard.spans if span.trace_id == TRACE_ID}

        eventually(lambda: ranks() == {0, 1} and names() >= {"queue", "prefill", "decode"}, "spans of both ranks")
        eventually(lambda: any(span.service == "shoal-front-door" for span in heard.spans), "the front door's span")
    ours = [span for span in heard.spans if span.trace_id == TRACE_ID]
    (door,) = [span for span in ours if span.service == "shoal-front-door"]
    assert door.parent_id == "b7ad6b7169203331", "the client's span is the parent"
    assert {"gen_ai.operation.name", "gen_ai.request.model", "gen_ai.usage.output_tokens"} <= door.attributes.keys()
    others = [span for span in ours if span is not door]
    assert {span.service for span in others} == {"shoal-rank"}
    assert {span.parent_id for span in others} == {door.span_id}
