"""Many requests over one stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from cluster.front_door.call import Call
from cluster.front_door.convert import Asker, call_of, chat_call_of, chunk_message
from cluster.front_door.desk import Desk
from cluster.front_door.errors import WIRE, InvalidRequest, RequestError, RequestNotFound, Unavailable
from cluster.front_door.grpc_errors import code_number
from cluster.front_door.grpc_guard import Context, check_parsed
from cluster.front_door.incidents import incident
from protos.shoal.v1 import inference_pb2 as pb

__all__ = ["Session"]

log = logging.getLogger(__name__)


class Session:
    """One client's stream. An error ends its request, never the stream; the stream's end ends all its requests.

    Where the front door leaves, what is open is finished, and new requests are told so: a stream hears of it no other
    way.
    """

    def __init__(self, desk: Desk, asker: Asker, context: Context) -> None:
        self._desk = desk
        self._asker = asker
        self._context = context
        # gRPC takes one write at a time. While one waits, the desk merges what the others will write.
        self._writing = asyncio.Lock()

    async def run(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        """Until the client has sent its last request and got its last answer."""
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await self._take(request, tasks)
        except* grpc.aio.InternalError:
            log.debug("the client of a session is gone")  # a write found out before the news got round

    async def _take(self, request: pb.SessionRequest, tasks: asyncio.TaskGroup) -> None:
        request_id = ""
        try:
            check_parsed(request)
            action = request.WhichOneof("action")
            if action is None:
                raise InvalidRequest("one of generate, chat and cancel must be given", field="action")
            request_id = getattr(request, action).request_id
            if not request_id:
                raise InvalidRequest("in a session, request_id must be given", field="request_id")
            if action == "cancel":
                if not self._desk.cancel(request_id, self._asker.client):
                    raise RequestNotFound("no request of that id is open", field="request_id")
                return
            if self._desk.leaving:
                raise Unavailable("the front door is shutting down: open another session", retry_after_s=1.0)
            call = (
                call_of(request.generate, self._asker, request_id=request_id)
                if action == "generate"
                else chat_call_of(request.chat, self._asker, request_id=request_id)
            )
        except RequestError as error:
            await self._fail(request_id, error)
            return
        tasks.create_task(self._run(call))
        # The task gets as far as the desk, so that a cancel right behind the request finds it.
        await asyncio.sleep(0)

    async def _run(self, call: Call) -> None:
        try:
            async with aclosing(self._desk.open(call)) as chunks:
                async for chunk in chunks:
                    message = chunk_message(chunk, call.request_id, self._desk.card, self._desk.codec)
                    await self._send(pb.SessionEvent(chunk=message))
        except RequestError as error:
            await self._fail(call.request_id, error)
        except grpc.aio.InternalError:
            raise  # the stream itself
        except Exception as error:
            await self._fail(call.request_id, incident(error, f"session request {call.request_id}"))

    async def _fail(self, request_id: str, error: RequestError) -> None:
        wire = WIRE[type(error)]
        await self._send(
            pb.SessionEvent(
                error=pb.SessionError(
                    request_id=request_id,
                    code=code_number(wire.grpc),
                    message=error.message,
                    field=error.field,
                    retry_after_s=error.retry_after_s,
                )
            )
        )

    async def _send(self, event: pb.SessionEvent) -> None:
        async with self._writing:
            await self._context.write(event)
