"""What a request's headers say, and the middleware that answers for what nobody foresaw."""

from __future__ import annotations

import math
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.front_door.auth import Authenticate, key_in_metadata
from cluster.front_door.errors import InvalidRequest
from cluster.front_door.http.calls import Asker
from cluster.front_door.http.connection import ClientGone
from cluster.front_door.http.faults import error_response
from cluster.front_door.http.seam import DeskLike

__all__ = ["LAST_EVENT_ID", "RATE_LIMIT_HEADERS", "Envelop", "asker"]

REQUEST_ID = "x-request-id"
TIMEOUT = "x-request-timeout"
IDEMPOTENCY_KEY = "idempotency-key"
LAST_EVENT_ID = "last-event-id"
_MOST_DIGITS = 9
_MOST_ID_CHARS = 128
RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")
)
_STANDINGS = "standings"  # in a request's state


class Envelop:
    """Gives every answer a request id, the client's own where it sent one, and turns what was raised into an error.

    Innermost of the middlewares, so that the answers for errors pass through the others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers.update(_rate_limits(scope))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            return
        except Exception as error:
            if started:
                raise
            await error_response(error)(scope, receive, send_with_id)


def asker(request: Request, authenticate: Authenticate | None, desk: DeskLike) -> Asker:
    """Raises Unauthenticated, PermissionDenied or InvalidRequest. The answer will tell of the tenant's limits."""
    headers = request.headers
    client = authenticate(key_in_metadata(headers.items())) if authenticate is not None else ""
    setattr(request.state, _STANDINGS, lambda: desk.standings(client))
    return Asker(
        client=client,
        timeout_s=_timeout_s(headers),
        traceparent=headers.get("traceparent", ""),
        idempotency_key=headers.get(IDEMPOTENCY_KEY, ""),
        held=_held(headers),
    )


def _held(headers: Headers) -> tuple[int, ...]:
    """What the client has of a stream that broke, by the id of the last event that reached it."""
    given = headers.get(LAST_EVENT_ID, "")
    if not given:
        return ()
    if not headers.get(IDEMPOTENCY_KEY):
        raise InvalidRequest(f"{LAST_EVENT_ID} needs the Idempotency-Key of the stream that broke", field=LAST_EVENT_ID)
    numbers = given.split(",")
    if not all(number.isascii() and number.isdigit() and len(number) <= _MOST_DIGITS for number in numbers):
        raise InvalidRequest(
            f"{LAST_EVENT_ID} must be the id of an event, such as 17, not {given[:40]!r}", field=LAST_EVENT_ID
        )
    return tuple(map(int, numbers))


def _rate_limits(scope: Scope) -> dict[str, str]:
    """OpenAI's headers, as the tenant stands when the answer begins; none where it has no limits."""
    standings = scope.get("state", {}).get(_STANDINGS)
    found: dict[str, str] = {}
    for unit, standing in (standings() if standings is not None else {}).items():
        found[f"x-ratelimit-limit-{unit}"] = str(standing.limit)
        found[f"x-ratelimit-remaining-{unit}"] = str(standing.remaining)
        found[f"x-ratelimit-reset-{unit}"] = f"{standing.reset_s:.3f}s"
    return found


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID, "")
    if 0 < len(given) <= _MOST_ID_CHARS and given.isascii() and given.isprintable():
        return given
    return f"req-{secrets.token_hex(16)}"


def _timeout_s(headers: Headers) -> float | None:
    given = headers.get(TIMEOUT)
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidRequest(f"{TIMEOUT} must be a positive number of seconds, not {given[:40]!r}", field=TIMEOUT)
    return timeout_s
