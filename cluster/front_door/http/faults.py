"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math

from starlette.responses import Response

from cluster.front_door.errors import WIRE, InternalError, RequestError, Unavailable, WireStatus
from cluster.front_door.incidents import incident

__all__ = ["HttpFault", "error_body", "error_response", "wire_status"]

# Names of a call's parts that an HTTP client knows by another one.
_PARAMS = {"text": "prompt", "token_ids": "prompt", "held": "last-event-id"}


class HttpFault(Exception):
    """What is wrong with a request as HTTP or JSON, before it is a call."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}


def wire_status(error: RequestError) -> WireStatus:
    """The table's entry for an error or its nearest base."""
    for kind in type(error).__mro__:
        if kind in WIRE:
            return WIRE[kind]
    raise AssertionError(f"{type(error).__name__} is not in the table")


def error_body(error: Exception) -> tuple[int, dict[str, object], dict[str, str]]:
    """Status, body and headers. Of an error that nobody foresaw, only an incident's id is told."""
    if isinstance(error, HttpFault):
        return error.status, _body(error.message, "invalid_request_error", error.param, error.code), error.headers
    if not isinstance(error, RequestError):
        error = incident(error, "an HTTP request")
    status = wire_status(error)
    headers = {"WWW-Authenticate": "Bearer"} if status.http == 401 else {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unavailable):
        headers["Connection"] = "close"  # this door may be closing: the next connection can reach another one
    if isinstance(error, InternalError):
        headers["X-Should-Retry"] = "false"  # the openai clients would otherwise send it again at once
    param = _PARAMS.get(error.field, error.field)
    message = (
        param + error.message.removeprefix(error.field) if error.message.startswith(error.field) else error.message
    )
    return status.http, _body(message, status.type, param, status.code), headers


def error_response(error: Exception) -> Response:
    status, body, headers = error_body(error)
    return Response(json.dumps(body), status_code=status, headers=headers, media_type="application/json")


def _body(message: str, kind: str, param: str, code: str) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param or None, "code": code}}
