"""A front door on free ports, in front of fake DP groups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.front_door.admin_door import Operations
from cluster.front_door.errors import InvalidRequest
from cluster.front_door.limits import Limits
from cluster.front_door.quotas import Quotas
from cluster.front_door.server import FrontDoorServer, FrontDoorSettings
from cluster.front_door.tls import TlsFiles
from protos.shoal.v1 import admin_pb2, inference_pb2_grpc
from protos.shoal.v1 import inference_pb2 as pb
from tests.fakes import CARD, SECRET, ByteCodec, FakeGroup, LineTemplate, hashed, serving
from workers.guided import GrammarCompiler

__all__ = ["Door", "FakeOperations", "Stream", "expected_text", "open_door", "ready", "request", "rest", "take"]

Stream = grpc.aio.UnaryStreamCall[Any, pb.GenerateChunk]


@dataclass
class Door:
    """A server and a client of it."""

    server: FrontDoorServer
    channel: grpc.aio.Channel
    stub: inference_pb2_grpc.InferenceAsyncStub

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"


@asynccontextmanager
async def open_door(
    *groups: FakeGroup,
    limits: Limits | None = None,
    api_keys: Mapping[str, str | Sequence[str]] | None = None,
    http: bool = False,
    secret: str = SECRET,
    await_groups: bool = True,
    grpc_port: int = 0,
    operations: Operations | None = None,
    administrators: tuple[str, ...] = (),
    chaos: bool = False,
    grammars: GrammarCompiler | None = None,
    quotas: Quotas | None = None,
    tls: TlsFiles | None = None,
) -> AsyncIterator[Door]:
    """Groups are started, the door opened, and all of it ended whatever happens."""
    settings = FrontDoorSettings(
        front_door_id="test",
        secret=secret,
        grpc_port=grpc_port,
        http_port=0 if http else None,
        limits=limits or Limits(),
        api_keys=api_keys or {},
        quotas=quotas or Quotas(),
        tls=tls,
        administrators=administrators,
        chaos=chaos,
    )
    async with serving(*groups):
        server = FrontDoorServer(
            settings, card=CARD, codec=ByteCodec(), template=LineTemplate(), operations=operations, grammars=grammars
        )
        await server.start()
        try:
            server.set_groups([group.address for group in groups])
            if await_groups:
                await ready(server, len(groups))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
                yield Door(server, channel, inference_pb2_grpc.InferenceStub(channel))
        finally:
            await server.stop()


class FakeOperations:
    """Says what it was asked."""

    async def status(self) -> admin_pb2.StatusResponse:
        return admin_pb2.StatusResponse(model="fake", warnings=["slow"])

    async def drain(self, request: admin_pb2.DrainRequest) -> AsyncIterator[admin_pb2.OperationEvent]:
        yield _event(f"drains {request.target}")
        yield _event("drained", admin_pb2.OperationEvent.STATE_DONE)

    async def scale(self, request: admin_pb2.ScaleRequest) -> AsyncIterator[admin_pb2.OperationEvent]:
        yield _event(f"scales to {request.engines}", admin_pb2.OperationEvent.STATE_DONE)

    async def rollout(self, request: admin_pb2.RolloutRequest) -> AsyncIterator[admin_pb2.OperationEvent]:
        raise InvalidRequest("config: no such key", field="config")
        yield _event("")

    async def inject(self, request: admin_pb2.InjectRequest) -> admin_pb2.InjectResponse:
        return admin_pb2.InjectResponse(node=request.target)


def _event(
    line: str, state: admin_pb2.OperationEvent.State.ValueType = admin_pb2.OperationEvent.STATE_RUNNING
) -> admin_pb2.OperationEvent:
    return admin_pb2.OperationEvent(state=state, line=line)


async def ready(server: FrontDoorServer, num_groups: int) -> None:
    """Waits for the streams to this many groups."""
    changed = asyncio.Event()
    server.links.on_change(changed.set)
    async with asyncio.timeout(20):
        while sum(link.ready for link in server.links.links.values()) < num_groups:
            await changed.wait()
            changed.clear()


def expected_text(prompt: list[int], seed: int, num_tokens: int) -> str:
    """What a group that `hashed` speaks for answers when nothing goes wrong."""
    output: list[int] = []
    while len(output) < num_tokens:
        output.append(hashed(prompt, output, seed))
    return bytes(output).decode()


def request(text: str = "hi", **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**sampling))  # type: ignore[arg-type]


async def take(stream: Stream) -> pb.GenerateChunk:
    """The next chunk, which there must be."""
    chunk = await stream.read()
    assert isinstance(chunk, pb.GenerateChunk)
    return chunk


async def rest(stream: Stream) -> list[pb.GenerateChunk]:
    """All further chunks of a stream that `take` has read from."""
    chunks = []
    while isinstance(chunk := await stream.read(), pb.GenerateChunk):
        chunks.append(chunk)
    return chunks
