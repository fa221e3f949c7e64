"""What can go wrong with a request, in the words that a client may see.

    RequestError
    ├── InvalidRequest        the request itself; `field` names what to change
    ├── ModelNotFound         the model is not served here
    ├── RequestNotFound       no request of that id
    ├── AlreadyExists         the request id is taken
    ├── Unauthenticated       no key, or a wrong one
    ├── PermissionDenied      the key is good, the role is not
    ├── RateLimited           the tenant's or the key's limit; `retry_after_s`
    ├── Overloaded            the cluster's limit; `retry_after_s`
    ├── DeadlineExceeded      the client's deadline passed, or cannot be met
    ├── Cancelled             by the client
    ├── Unavailable           no DP group is ready; worth a retry
    └── InternalError         ours; the log has the story, the client an id

One table maps each to its gRPC code and its HTTP status. A message never holds a traceback, a path or an address.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

__all__ = [
    "WIRE",
    "AlreadyExists",
    "Cancelled",
    "DeadlineExceeded",
    "InternalError",
    "InvalidRequest",
    "ModelNotFound",
    "Overloaded",
    "PermissionDenied",
    "RateLimited",
    "RequestError",
    "RequestNotFound",
    "Unauthenticated",
    "Unavailable",
    "WireStatus",
]


class RequestError(Exception):
    """The base; `field` is the request's field at fault, if one is."""

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(RequestError):
    pass


class ModelNotFound(RequestError):
    pass


class RequestNotFound(RequestError):
    pass


class AlreadyExists(RequestError):
    pass


class Unauthenticated(RequestError):
    pass


class PermissionDenied(RequestError):
    pass


class RateLimited(RequestError):
    pass


class Overloaded(RequestError):
    pass


class DeadlineExceeded(RequestError):
    pass


class Cancelled(RequestError):
    pass


class Unavailable(RequestError):
    pass


class InternalError(RequestError):
    pass


@dataclass(frozen=True, slots=True)
class WireStatus:
    """How one kind of error looks on both doors; `type` and `code` are OpenAI's."""

    grpc: grpc.StatusCode
    http: int
    type: str
    code: str


WIRE: dict[type[RequestError], WireStatus] = {
    InvalidRequest: WireStatus(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", "invalid_value"),
    ModelNotFound: WireStatus(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", "model_not_found"),
    RequestNotFound: WireStatus(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", "request_not_found"),
    AlreadyExists: WireStatus(grpc.StatusCode.ALREADY_EXISTS, 409, "invalid_request_error", "request_exists"),
    Unauthenticated: WireStatus(grpc.StatusCode.UNAUTHENTICATED, 401, "authentication_error", "invalid_api_key"),
    PermissionDenied: WireStatus(grpc.StatusCode.PERMISSION_DENIED, 403, "permission_error", "permission_denied"),
    RateLimited: WireStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "rate_limit_exceeded"),
    Overloaded: WireStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "overloaded"),
    DeadlineExceeded: WireStatus(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout_error", "deadline_exceeded"),
    Cancelled: WireStatus(grpc.StatusCode.CANCELLED, 499, "cancelled_error", "cancelled"),
    Unavailable: WireStatus(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable_error", "unavailable"),
    InternalError: WireStatus(grpc.StatusCode.INTERNAL, 500, "server_error", "internal_error"),
}
