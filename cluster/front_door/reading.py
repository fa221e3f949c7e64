"""One reading of a call, and what is written down when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from cluster.front_door.errors import WIRE, RequestError
from cluster.front_door.incidents import incident
from cluster.front_door.open_request import OpenRequest, Reader

__all__ = ["Reading"]


class Reading:
    """A context: however it is left, the call's work is ended (unless another reader took over) and accounted for."""

    def __init__(self, request: OpenRequest, on_left: Callable[[OpenRequest], None]) -> None:
        self._request = request
        self._on_left = on_left
        # A reader that takes over brings its own.
        self._meter = request.meter
        self._span = request.span
        self._reader: Reader | None = None

    def begin(self) -> Reader:
        self._reader = self._request.attach()
        return self._reader

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        request = self._request
        failure: RequestError | None = None
        if isinstance(error, RequestError):
            failure = error
        elif error is not None and not isinstance(error, GeneratorExit | asyncio.CancelledError):
            failure = incident(error, f"request {request.call.request_id}")
        all_given = failure is None and request.finished and not request.has_news
        outcome = WIRE[type(failure)].code if failure else "ok" if all_given else "disconnected"
        if self._reader is None or request.is_read_by(self._reader):
            self._on_left(request)
        reasons = [choice.output.finish.value if choice.output.finish else "abort" for choice in request.choices]
        self._meter.end(outcome, reasons, request.usage)
        self._span.end(request.usage, reasons, failure, self._meter.time_to_first_token_s)
        if failure is not None and failure is not error:
            raise failure from None
