"""Streams that go on when a front door dies, for asyncio and for threads.

    async for chunk in follow(lambda: grpc.aio.insecure_channel(address, CHANNEL_OPTIONS), held):
        ...

Each try opens a channel of its own: front doors of one node share their port, so the next connection finds a living
one. With several nodes, let `connect` take their addresses in turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from functools import partial
from typing import Any

import grpc

from cluster.client.held import Held, worth_resuming
from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc

__all__ = ["follow", "follow_blocking"]

Metadata = Sequence[tuple[str, str]]

_PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.5)


class _Patience:
    """Pauses between tries that bring nothing; raises what went wrong once nothing has come for too long."""

    def __init__(self, patience_s: float, first_s: float) -> None:
        self._patience_s = patience_s
        self._left_s = first_s
        self._tries = 0
        self._since_s = time.monotonic()

    def heard(self) -> None:
        self._tries, self._since_s, self._left_s = 0, time.monotonic(), self._patience_s

    def pause_s(self, error: grpc.RpcError) -> float:
        if not worth_resuming(error) or time.monotonic() - self._since_s > self._left_s:
            raise error
        self._tries += 1
        return _PAUSES_S[min(self._tries, len(_PAUSES_S)) - 1]


async def follow(
    connect: Callable[[], grpc.aio.Channel],
    held: Held,
    *,
    metadata: Metadata = (),
    timeout_s: float | None = None,
    patience_s: float = 60.0,
) -> AsyncGenerator[pb.GenerateChunk, None]:
    """The request's chunks, each token once. Raises grpc.RpcError, or BrokenStream.

    `timeout_s` is the deadline of each try, `patience_s` how long nothing may come before it gives up.
    """
    patience = _Patience(patience_s, patience_s)
    again = False
    while True:
        try:
            async with connect() as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                async for chunk in _call(stub, held, again)(metadata=metadata, timeout=timeout_s):
                    patience.heard()
                    held.take(chunk)
                    yield chunk
            return
        except grpc.aio.AioRpcError as error:
            pause_s = patience.pause_s(error)
            if held.finished:
                return
        again = True
        await asyncio.sleep(pause_s)


def follow_blocking(
    stub: inference_pb2_grpc.InferenceStub,
    connect: Callable[[], grpc.Channel],
    held: Held,
    *,
    metadata: Metadata = (),
    patience_s: float = 60.0,
) -> Generator[pb.GenerateChunk, None, None]:
    """The same in a thread, for somebody who waits: before the first chunk nothing is tried again.

    The first try goes over `stub`. Closing the iterator cancels the call.
    """
    patience = _Patience(patience_s, 0.0)
    opened: list[grpc.Channel] = []
    again = False
    try:
        while True:
            call = _call(stub, held, again)(metadata=metadata)
            try:
                for chunk in call:
                    patience.heard()
                    held.take(chunk)
                    yield chunk
                return
            except grpc.RpcError as error:
                pause_s = patience.pause_s(error)
                if held.finished:
                    return
            finally:
                call.cancel()
            again = True
            time.sleep(pause_s)
            opened.append(connect())
            stub = inference_pb2_grpc.InferenceStub(opened[-1])
    finally:
        for channel in opened:
            channel.close()


def _call(stub: inference_pb2_grpc.InferenceStub, held: Held, again: bool) -> Callable[..., Any]:
    """The method with its request."""
    if again:
        return partial(stub.Resume, held.resume())
    if isinstance(held.request, pb.GenerateRequest):
        return partial(stub.Generate, held.request)
    return partial(stub.Chat, held.request)
