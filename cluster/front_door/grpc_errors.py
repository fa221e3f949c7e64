"""Errors in gRPC's words: a code, a message, and google.rpc details that say which field, or when to try again."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from cluster.front_door.errors import WIRE, RequestError

__all__ = ["DOMAIN", "rich_status", "trailing_metadata"]

DOMAIN = "shoal"


def rich_status(error: RequestError) -> status_pb2.Status:
    """BadRequest names the field, RetryInfo the pause, ErrorInfo the kind."""
    wire = WIRE[type(error)]
    details: list[Message] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details.append(error_details_pb2.ErrorInfo(reason=wire.code.upper(), domain=DOMAIN))
    packed = [any_pb2.Any() for _ in details]
    for box, detail in zip(packed, details, strict=True):
        box.Pack(detail)
    return status_pb2.Status(code=code_number(wire.grpc), message=error.message, details=packed)


def trailing_metadata(error: RequestError) -> tuple[tuple[str, bytes], ...]:
    """Where clients' libraries look for the details."""
    return (("grpc-status-details-bin", rich_status(error).SerializeToString()),)


def code_number(code: grpc.StatusCode) -> int:
    """A google.rpc.Code."""
    number: int = code.value[0]
    return number
