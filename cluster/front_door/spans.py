"""The trace of one request, in OpenTelemetry's words for generative models.

Only the API is used here: without an SDK every span is a no-op, and the client's own context is passed on. The names
are those of the GenAI semantic conventions, https://github.com/open-telemetry/semantic-conventions-genai, written out
because the Python package marks all of its constants deprecated since they moved there.
"""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from cluster.front_door.call import Call, Usage
from cluster.front_door.errors import WIRE, RequestError
from cluster.front_door.validate import Prepared

__all__ = ["RequestSpan"]

_PROPAGATOR = TraceContextTextMapPropagator()


class RequestSpan:
    """From the arrival of a call to its last chunk."""

    def __init__(self, tracer: trace.Tracer, call: Call, model: str) -> None:
        operation = "chat" if call.messages is not None else "text_completion"
        carrier = {"traceparent": call.traceparent} if call.traceparent else {}
        self._span = tracer.start_span(
            f"{operation} {model}",
            context=_PROPAGATOR.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "shoal",
                "gen_ai.request.model": call.model or model,
                "gen_ai.response.model": model,
                "gen_ai.response.id": call.request_id,
                "shoal.door": call.door,
            },
        )
        self._client_traceparent = call.traceparent

    @property
    def traceparent(self) -> str:
        """What the engine's spans hang from."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._span))
        return carrier.get("traceparent", self._client_traceparent)

    def prepared(self, prepared: Prepared) -> None:
        """The call's values are known."""
        if not self._span.is_recording():
            return
        sampling = prepared.sampling
        attributes: dict[str, AttributeValue] = {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.usage.input_tokens": len(prepared.prompt_token_ids),
        }
        if prepared.n > 1:
            attributes["gen_ai.request.choice.count"] = prepared.n
        if prepared.stop:
            attributes["gen_ai.request.stop_sequences"] = prepared.stop
        self._span.set_attributes(attributes)

    def end(
        self, usage: Usage, reasons: Sequence[str], error: RequestError | None, time_to_first_token_s: float | None
    ) -> None:
        """The call is over."""
        span = self._span
        if span.is_recording():
            span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
            if reasons:
                span.set_attribute("gen_ai.response.finish_reasons", list(reasons))
            if time_to_first_token_s is not None:
                span.set_attribute("gen_ai.response.time_to_first_chunk", time_to_first_token_s)
            if error is not None:
                code = WIRE[type(error)].code
                span.set_attribute("error.type", code)
                span.set_status(Status(StatusCode.ERROR, error.message))
        span.end()
