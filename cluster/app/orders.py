"""An administrator's order at a front door: given to the roster, and followed until it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from google.protobuf.message import Message
from ray.exceptions import RayError

from cluster.front_door.errors import Unavailable
from cluster.orders import News
from protos.shoal.v1 import admin_pb2

__all__ = ["carry_out"]

_LOOK_S = 0.2
_TRY_S = 30.0
_AWAY = "the roster does not answer; look at `shoal status` and try again"
_STATES = {
    "running": admin_pb2.OperationEvent.STATE_RUNNING,
    "done": admin_pb2.OperationEvent.STATE_DONE,
    "failed": admin_pb2.OperationEvent.STATE_FAILED,
}


async def carry_out(
    roster: Any, kind: Literal["drain", "scale", "rollout"], request: Message
) -> AsyncIterator[admin_pb2.OperationEvent]:
    """The order's news, as they come. Raises Unavailable where the roster is away for long, or forgot the order."""
    try:
        number = await roster.give_order.remote(kind, request.SerializeToString())
    except RayError:
        raise Unavailable(_AWAY, retry_after_s=5.0) from None
    seen = 0
    while True:
        news = await _news(roster, number, seen)
        if news is None:
            raise Unavailable("the roster was started again and forgot the order; look at `shoal status`")
        for each in news:
            yield admin_pb2.OperationEvent(state=_STATES[each.state], line=each.line)
            if each.state != "running":
                return
        seen += len(news)
        await asyncio.sleep(_LOOK_S)


async def _news(roster: Any, number: int, seen: int) -> Sequence[News] | None:
    """Ray starts a roster that died again, and the next one knows the order."""
    give_up_s = time.monotonic() + _TRY_S
    while True:
        try:
            return await roster.news.remote(number, seen)  # type: ignore[no-any-return]
        except RayError:
            if time.monotonic() > give_up_s:
                raise Unavailable(_AWAY, retry_after_s=5.0) from None
        await asyncio.sleep(_LOOK_S)
