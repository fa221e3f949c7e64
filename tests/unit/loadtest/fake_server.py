"""A server of both doors that makes tokens out of nothing, and errs on request.

python -m tests.unit.loadtest.fake_server     prints its two ports, serves until its input ends
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc as rpc

__all__ = ["FakeServer", "Faults", "serving"]


@dataclass(slots=True)
class Faults:
    """What goes wrong in every answer; read at each request."""

    repeat_at: int | None = None  # sends this position twice
    skip_at: int | None = None  # never sends this position
    break_at: int | None = None  # ends the stream with an error here
    end_at: int | None = None  # stops early, and calls it finished


@dataclass(slots=True)
class FakeServer:
    """Where a running fake listens, and its faults."""

    address: str
    http_url: str
    faults: Faults = field(default_factory=Faults)


class _Inference(rpc.InferenceServicer):
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        model = pb.Model(name="fake", max_model_len=512, vocab_size=1000, dtype="float32")
        return pb.ListModelsResponse(models=[model])

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateChunk]:
        faults = self._faults
        num_tokens = request.sampling.max_tokens if faults.end_at is None else faults.end_at
        for position in range(num_tokens):
            if position == faults.break_at:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on request")
            if position == faults.skip_at:
                continue
            yield _chunk(position, last=position == num_tokens - 1)
            if position == faults.repeat_at:
                yield _chunk(position, last=False)


def _chunk(position: int, *, last: bool) -> pb.GenerateChunk:
    reason = pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED
    return pb.GenerateChunk(position=position, token_ids=[position + 1], text="x", finish_reason=reason)


class _Http:
    """`/v1/models` and streamed `/v1/completions` over plain asyncio streams, one request a connection."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length:")]
        body = await reader.readexactly(int(lengths[0])) if lengths else b""
        if "/v1/models" in head:
            payload = json.dumps({"object": "list", "data": [{"id": "fake", "max_model_len": 512}]})
            writer.write(_head(200, "application/json") + payload.encode())
        elif json.loads(body)["model"] != "fake":
            writer.write(_head(404, "application/json") + b'{"error": {"message": "no such model"}}')
        else:
            writer.write(_head(200, "text/event-stream") + b"".join(map(_event, self._events(json.loads(body)))))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    def _events(self, body: dict[str, Any]) -> list[str]:
        asked: int = body["max_tokens"]
        num_tokens = asked if self._faults.end_at is None else self._faults.end_at
        events: list[str] = []
        for position in range(num_tokens):
            if position == self._faults.break_at:
                return [*events, json.dumps({"error": {"message": "broken on request"}})]
            if position != self._faults.skip_at:
                reason = "length" if position == num_tokens - 1 else None
                choice = {"index": 0, "text": "x", "token_ids": [position], "finish_reason": reason}
                events.append(json.dumps({"choices": [choice]}))
        return [*events, json.dumps({"choices": [], "usage": {"completion_tokens": num_tokens}}), "[DONE]"]


def _head(status: int, kind: str) -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode()


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


@asynccontextmanager
async def serving() -> AsyncIterator[FakeServer]:
    """Both doors on free ports of the loopback."""
    faults = Faults()
    grpc_server = grpc.aio.server()
    rpc.add_InferenceServicer_to_server(_Inference(faults), grpc_server)  # type: ignore[abstract]  # two suffice
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    http_server = await asyncio.start_server(_Http(faults).answer, "127.0.0.1", 0)
    http_port = http_server.sockets[0].getsockname()[1]
    try:
        yield FakeServer(f"127.0.0.1:{port}", f"http://127.0.0.1:{http_port}", faults)
    finally:
        http_server.close()
        await http_server.wait_closed()
        await grpc_server.stop(None)


async def _serve_until_input_ends() -> None:
    async with serving() as server:
        print(server.address, server.http_url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve_until_input_ends())
