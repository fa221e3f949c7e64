"""The client's end of a request: its body within a limit, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive

from cluster.front_door.http.faults import HttpFault

__all__ = ["ClientGone", "read_body", "while_connected"]

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection; nobody is there to be told."""


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """The whole body. Raises HttpFault as soon as it is known to be too large."""
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(max_bytes: int) -> HttpFault:
    # The rest of the body will not be read, so the connection cannot be used again.
    return HttpFault(
        413,
        f"the body is larger than the limit of {max_bytes} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )


async def while_connected(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """Runs `work`, and cancels it at once when the client goes away: then raises ClientGone.

    The body must have been read: what `receive` brings after it is the end of the connection.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        pending = [each for each in (task, gone) if not each.done()]
        for each in pending:
            each.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
