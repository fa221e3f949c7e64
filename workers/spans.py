"""What a trace shows of a DP group: `queue`, `prefill` and `decode` of a sequence, and `step` of each rank.

Only the OpenTelemetry API is used: without an SDK in the process all of this does nothing. Spans are made when they
are over, with explicit times, so a token costs nothing; ranks record only the steps that prefill a traced sequence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scheduler.plan import Event, FinishReason
from scheduler.request import Request

__all__ = ["SequenceSpans", "record_step"]

_NS = 1_000_000_000
_tracer = trace.get_tracer("shoal.workers")
_propagator = TraceContextTextMapPropagator()


def _context(traceparent: str) -> Context:
    return _propagator.extract({"traceparent": traceparent}, context=Context())


def _record(name: str, context: Context, start_ns: int, end_ns: int, attributes: Mapping[str, Any]) -> None:
    _tracer.start_span(name, context=context, start_time=start_ns, attributes=dict(attributes)).end(end_ns)


def record_step(traceparent: str, *, rank: int, step: int, num_tokens: int, num_sequences: int, start_ns: int) -> None:
    """One rank's part of a step that ends now."""
    attributes = {
        "shoal.rank": rank,
        "shoal.step": step,
        "shoal.num_tokens": num_tokens,
        "shoal.num_sequences": num_sequences,
    }
    _record("step", _context(traceparent), start_ns, time.time_ns(), attributes)


class SequenceSpans:
    """The spans of one traced sequence."""

    def __init__(self, request: Request, *, rank: int) -> None:
        self._context = _context(request.traceparent)
        self._attributes = {"shoal.request_id": request.request_id, "shoal.rank": rank}
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._submitted_ns = time.time_ns()
        self._first_token_ns: int | None = None

    def see(self, event: Event) -> None:
        """Records what `event` completes."""
        now_ns = time.time_ns()
        if event.queue_s is not None and event.prefill_s is not None:
            prefill_ns = now_ns - int(event.prefill_s * _NS)
            queue_ns = prefill_ns - int(event.queue_s * _NS)
            self._first_token_ns = now_ns
            prefill = {
                "gen_ai.usage.input_tokens": self._num_prompt_tokens,
                "shoal.num_cached_tokens": event.num_cached_tokens,
            }
            _record("queue", self._context, queue_ns, prefill_ns, self._attributes)
            _record("prefill", self._context, prefill_ns, now_ns, self._attributes | prefill)
        if event.finish is not None:
            num_tokens = event.position + (event.token_id is not None)
            end: dict[str, Any] = {
                "gen_ai.response.finish_reasons": [event.finish.value],
                "gen_ai.usage.output_tokens": num_tokens,
            }
            name, start_ns = "decode", self._first_token_ns
            if start_ns is None:
                # It ended before its first token: all it ever did was wait.
                name, start_ns = "queue", self._submitted_ns
            if event.finish is FinishReason.FAILED:
                end["error.type"] = "engine_failed"
            _record(name, self._context, start_ns, now_ns, self._attributes | end)
