"""Around every method of the gRPC door: who asks, what goes wrong, and in which words the client hears of it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from cluster.front_door.auth import Authenticate, key_in_metadata
from cluster.front_door.convert import Asker
from cluster.front_door.errors import WIRE, InvalidRequest, RequestError
from cluster.front_door.grpc_errors import trailing_metadata
from cluster.front_door.incidents import incident

__all__ = ["Context", "Guard", "Malformed", "Method", "check_parsed", "handler"]

Context = grpc.aio.ServicerContext[Any, Any]
log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
# Longer than any real deadline: what some clients send for "none".
_FOREVER_S = 10 * 365 * 24 * 3600.0


class Malformed:
    """In place of a message that could not be parsed, so that the answer is ours and not the library's."""


@dataclass(frozen=True, slots=True)
class Method:
    """A guarded behaviour, the type of its requests, and grpc's maker of a handler of its kind."""

    behaviour: Callable[[Any, Context], Awaitable[object]]
    request: type[Message]
    kind: Callable[..., grpc.RpcMethodHandler[Any, Any]]


class Guard:
    """Wraps a method: counts, authenticates, and turns what it raises into a status."""

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate
        self.num_calls = 0  # that have come

    def __call__(
        self, method: Callable[[Any, Asker, Context], Awaitable[object]], name: str
    ) -> Callable[[Any, Context], Awaitable[object]]:
        async def guarded(request: Any, context: Context) -> object:
            self.num_calls += 1
            try:
                asker = self._asker(context)
                check_parsed(request)
                return await method(request, asker, context)
            except RequestError as error:
                failure = error
            except grpc.aio.AbortError:
                raise
            except grpc.aio.InternalError:
                # What a write raises where the client has gone and the news has not got round yet.
                log.debug("the client of %s is gone", name)
                return None
            except Exception as error:
                failure = incident(error, f"gRPC method {name}")
            await context.abort(WIRE[type(failure)].grpc, failure.message, trailing_metadata(failure))
            return None

        return guarded

    def _asker(self, context: Context) -> Asker:
        metadata = context.invocation_metadata() or ()
        left_s = context.time_remaining()
        return Asker(
            client=self._authenticate(key_in_metadata(metadata)),
            timeout_s=left_s if left_s is not None and left_s < _FOREVER_S else None,
            traceparent=next((str(value) for name, value in metadata if name == "traceparent"), ""),
        )


def check_parsed(request: object) -> None:
    """Raises InvalidRequest for what stands in place of a broken message."""
    if isinstance(request, Malformed):
        raise InvalidRequest("the message cannot be read: it is not valid protobuf, or a text in it is not UTF-8")


def handler(service: str, methods: Mapping[str, Method]) -> grpc.GenericRpcHandler[Any, Any]:
    """What a server needs to know of a service."""
    return grpc.method_handlers_generic_handler(
        service,
        {
            name: method.kind(
                method.behaviour, request_deserializer=_parser(method.request), response_serializer=_serialize
            )
            for name, method in methods.items()
        },
    )


def _parser(message: type[M]) -> Callable[[bytes], M | Malformed]:
    parse = message.FromString

    def parse_or_mark(data: bytes) -> M | Malformed:
        try:
            return parse(data)
        except DecodeError:
            return Malformed()

    return parse_or_mark


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
