"""An administrator's order at a front door: given to the roster, and followed until it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

from google.protobuf.message import Message
from ray.exceptions import RayError

from cluster.front_door.errors import Unavailable
from protos.shoal.v1 import admin_pb2

__all__ = ["carry_out"]

_LOOK_S = 0.2
_STATES = {
    "running": admin_pb2.OperationEvent.STATE_RUNNING,
    "done": admin_pb2.OperationEvent.STATE_DONE,
    "failed": admin_pb2.OperationEvent.STATE_FAILED,
}


async def carry_out(
    roster: Any, kind: Literal["drain", "scale", "rollout"], request: Message
) -> AsyncIterator[admin_pb2.OperationEvent]:
    """The order's news, as they come. Raises Unavailable where the roster was lost, and the order with it."""
    try:
        number = await roster.give_order.remote(kind, request.SerializeToString())
        seen = 0
        while True:
            news = await roster.news.remote(number, seen)
            if news is None:
                raise Unavailable("the roster was started again and forgot the order; look at `shoal status`")
            for each in news:
                yield admin_pb2.OperationEvent(state=_STATES[each.state], line=each.line)
                if each.state != "running":
                    return
            seen += len(news)
            await asyncio.sleep(_LOOK_S)
    except RayError:
        raise Unavailable(
            "the roster does not answer; look at `shoal status` and try again", retry_after_s=5.0
        ) from None
