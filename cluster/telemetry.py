"""Traces: OpenTelemetry's SDK, set up where an endpoint is configured and nowhere else.

Everything else of ours speaks the API alone, which does nothing until this has run.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.config.environment import otlp_endpoint
from cluster.config.schema import TelemetrySection

__all__ = ["endpoint_of", "export_traces", "flush"]


def endpoint_of(section: TelemetrySection) -> str | None:
    """The collector: the file's, else the environment's."""
    return section.otlp_endpoint or otlp_endpoint()


def export_traces(endpoint: str | None, service_name: str, attributes: Mapping[str, str | int]) -> None:
    """Sends this process's spans to `endpoint` in batches, the rest when the process ends. Without one, nothing."""
    if endpoint is None:
        return
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service_name, **attributes}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    trace.set_tracer_provider(provider)


def flush(timeout_s: float = 2.0) -> None:
    """Sends what has not been sent yet."""
    from opentelemetry import trace

    force_flush = getattr(trace.get_tracer_provider(), "force_flush", None)  # only the SDK's provider has it
    if force_flush is not None:
        force_flush(int(timeout_s * 1000))
