"""A process that is frozen, on a machine whose kernel goes on answering for it, is noticed within seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from cluster.client.held import CHANNEL_OPTIONS
from cluster.front_door import link
from workers import session

Options = Sequence[tuple[str, int]]

# Sends a message every 20 ms over each call.
_SERVER = """
import asyncio, grpc
async def count(request, context):
    while True:
        await context.write(b"x")
        await asyncio.sleep(0.02)
async def main():
    server = grpc.aio.server()
    handlers = {"Count": grpc.unary_stream_rpc_method_handler(count)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()
asyncio.run(main())
"""


_CLIENT = """
import grpc, sys
with grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}") as channel:
    for message in channel.unary_stream("/t.Test/Count")(b""):
        print("up", flush=True)
"""
_BUSY_S = 10.0  # a busy machine comes to it later; unnoticed it would be for a minute


@asynccontextmanager
async def _process(source: str, *arguments: str) -> AsyncIterator[tuple[int, str]]:
    """Its id, and the first line that it says."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", source, *arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.pid, (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.wait()


async def _read_all(call: Any) -> None:
    while isinstance(await call.read(), bytes):
        pass


@pytest.mark.parametrize(
    ("options", "within_s"), [(CHANNEL_OPTIONS, 3.0), (link._CHANNEL_OPTIONS, 6.0)], ids=["client", "front door"]
)
async def test_a_frozen_server_is_noticed(options: Options, within_s: float) -> None:
    async with (
        _process(_SERVER) as (pid, port),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel,
    ):
        call: Any = channel.unary_stream("/t.Test/Count")(b"")  # type: ignore[call-arg]  # bytes as they are
        for _ in range(20):
            assert await call.read() == b"x"
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(within_s + _BUSY_S):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _read_all(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_frozen_front_door_is_noticed_by_a_dp_group() -> None:
    gone = asyncio.Event()

    async def count(request: bytes, context: Any) -> None:
        del request
        context.add_done_callback(lambda context: gone.set())
        while True:
            await context.write(b"x")
            await asyncio.sleep(0.02)

    server = grpc.aio.server(options=session._OPTIONS)
    handlers = {"Count": grpc.unary_stream_rpc_method_handler(count)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with _process(_CLIENT, str(port)) as (pid, said):
            assert said == "up"
            os.kill(pid, signal.SIGSTOP)
            await asyncio.wait_for(gone.wait(), 6.0 + _BUSY_S)
    finally:
        await server.stop(None)
