"""Bytes to a request body, or a fault that says what to change."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers

from cluster.front_door.http.faults import HttpFault
from cluster.front_door.http.schema import (
    JsonSchemaBody,
    MessageBody,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
)

__all__ = ["check_content_type", "parse"]

Body = TypeVar("Body", bound=BaseModel)

_INSIDE: dict[str, type[BaseModel]] = {
    "messages": MessageBody,
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "json_schema": JsonSchemaBody,
    "structured_outputs": StructuredOutputs,
}
_MOST_SHOWN_CHARS = 60


def check_content_type(headers: Headers) -> None:
    """JSON must say so: a web page of anyone's may send other types here without being asked first."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HttpFault(415, "the Content-Type must be application/json", code="unsupported_media_type")


def parse(body: bytes, model: type[Body]) -> Body:
    """Raises HttpFault for the first thing that is wrong."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise _fault(_most_telling(details), model, body) from None


def _most_telling(details: list[ErrorDetails]) -> ErrorDetails:
    """A misspelt field explains what else is wrong, such as a field that is missing."""
    return next((each for each in details if each["type"] == "extra_forbidden"), details[0])


def _fault(detail: ErrorDetails, model: type[BaseModel], body: bytes) -> HttpFault:
    kind, where = detail["type"], detail["loc"]
    if kind == "json_invalid":
        return _not_json(detail, body)
    if not where:
        return HttpFault(400, "the body must be a JSON object", code="invalid_json")
    name = _dotted(where)
    if kind == "extra_forbidden":
        return HttpFault(400, _unknown(where, model), code="unknown_parameter", param=name)
    if kind == "missing":
        return HttpFault(400, f"{name} is required", code="missing_required_parameter", param=name)
    if kind == "unsupported":
        return HttpFault(400, _sentence(name, detail["msg"]), code="unsupported_parameter", param=name)
    if kind in ("texts", "prompt", "content"):
        return HttpFault(400, _sentence(name, detail["msg"]), code="invalid_type", param=name)
    message = detail["msg"].replace("Input should be", "must be").partition(", unable")[0]
    if where[-1] == "[key]":
        message = "has a key that is no token id"
        where = where[:-2]
        name = _dotted(where)
    shown = _shown(detail["input"])
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return HttpFault(400, f"{name} {message}, not {shown}", code=code, param=name)


def _not_json(detail: ErrorDetails, body: bytes) -> HttpFault:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return HttpFault(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_json")
    reason = detail["msg"].removeprefix("Invalid JSON: ")
    return HttpFault(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def _unknown(where: tuple[int | str, ...], model: type[BaseModel]) -> str:
    outer = next((part for part in reversed(where[:-1]) if isinstance(part, str)), "")
    inner = _INSIDE.get(outer, model)
    name = str(where[-1])
    known = [field.alias or name for name, field in inner.model_fields.items()]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return f"unknown field {_shown(_dotted(where))}{hint}"


def _dotted(where: tuple[int | str, ...]) -> str:
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _sentence(name: str, message: str) -> str:
    return f"{name}{message}" if message.startswith("[") else f"{name} {message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN_CHARS else text[: _MOST_SHOWN_CHARS - 3] + "..."
