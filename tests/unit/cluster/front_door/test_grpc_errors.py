"""Errors with google.rpc details."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from cluster.front_door.errors import WIRE, InternalError, InvalidRequest, Overloaded, RequestError
from cluster.front_door.grpc_errors import rich_status, trailing_metadata
from cluster.front_door.incidents import incident


def _detail(status: status_pb2.Status, message: Message) -> Message:
    (found,) = [each for each in status.details if each.Is(message.DESCRIPTOR)]
    found.Unpack(message)
    return message


def test_the_field_at_fault() -> None:
    status = rich_status(InvalidRequest("n must be less", field="n"))
    (violation,) = _detail(status, details.BadRequest()).field_violations  # type: ignore[attr-defined]
    assert (status.code, violation.field, violation.description) == (3, "n", "n must be less")


def test_when_to_try_again() -> None:
    status = rich_status(Overloaded("full", retry_after_s=1.5))
    retry = _detail(status, details.RetryInfo())
    assert retry.retry_delay.ToMilliseconds() == 1500  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", sorted(WIRE, key=str))
def test_every_kind_has_its_code_and_reason(kind: type[RequestError]) -> None:
    ((name, value),) = trailing_metadata(kind("what went wrong"))
    status = status_pb2.Status.FromString(value)
    info = _detail(status, details.ErrorInfo())
    assert name == "grpc-status-details-bin"
    assert status.code == WIRE[kind].grpc.value[0]
    assert info.reason == WIRE[kind].code.upper()  # type: ignore[attr-defined]


def test_an_incident_tells_the_log_and_not_the_client(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise RuntimeError("secret at /etc/passwd")
    except RuntimeError as error:
        shown = incident(error, "request 7")
    assert isinstance(shown, InternalError)
    assert "secret" not in shown.message
    (record,) = caplog.records
    assert shown.message.rsplit(" ", 1)[1] in record.getMessage()
    assert "secret at /etc/passwd" in caplog.text
