"""A front door's end of a DP group's stream, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc

from protos.shoal.v1 import inference_pb2, session_pb2, session_pb2_grpc
from tests.integration.rank_process import SECRET

__all__ = ["FrontDoorStream", "sampling"]


def sampling(max_tokens: int, **fields: Any) -> inference_pb2.SamplingParams:
    """Parameters with every field set, as a front door sends them; greedy unless told otherwise."""
    defaults: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 0,
        "max_tokens": max_tokens,
        "min_tokens": 0,
        "ignore_eos": True,
    }
    return inference_pb2.SamplingParams(**{**defaults, **fields})


class FrontDoorStream:
    """Use as an async context manager; collects what comes down by sequence id."""

    def __init__(self, address: str, *, secret: str = SECRET) -> None:
        self.address = address
        self.secret = secret
        self.messages: list[session_pb2.Downlink] = []
        self.tokens: dict[int, list[int]] = {}
        self.finishes: dict[int, int] = {}
        self.errors: dict[int, str] = {}
        self.ended: grpc.aio.AioRpcError | None = None
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> FrontDoorStream:
        self._channel = grpc.aio.insecure_channel(self.address)
        self._call: Any = session_pb2_grpc.DPGroupStub(self._channel).Connect(  # type: ignore[call-arg]  # write() feeds it
            metadata=(("shoal-secret", self.secret),)
        )
        await self._call.write(session_pb2.Uplink(hello=session_pb2.Hello(front_door_id="test")))
        self._reader = asyncio.create_task(self._read())
        await self.until(lambda: bool(self.messages) or self.ended is not None)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close(None)

    async def submit(
        self, sequence_id: int, prompt: Sequence[int], params: inference_pb2.SamplingParams, **more: Any
    ) -> None:
        await self.send(session_pb2.Submit(sequence_id=sequence_id, prompt_token_ids=prompt, sampling=params, **more))

    async def send(self, submit: session_pb2.Submit) -> None:
        """What it was replayed with counts among its tokens."""
        self.tokens[submit.sequence_id] = list(submit.output_token_ids)
        await self._call.write(session_pb2.Uplink(submit=submit))

    async def cancel(self, sequence_id: int) -> None:
        await self._call.write(session_pb2.Uplink(cancel=session_pb2.Cancel(sequence_id=sequence_id)))

    async def until(self, holds: Any, timeout_s: float = 30.0) -> None:
        """Waits for something that a message from the group makes true."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(holds)

    async def finish(self, *sequence_ids: int, timeout_s: float = 30.0) -> None:
        """Waits until these have ended."""
        await self.until(lambda: all(number in self.finishes for number in sequence_ids), timeout_s)

    async def _read(self) -> None:
        try:
            async for message in self._call:
                async with self._changed:
                    self.messages.append(message)
                    for output in message.outputs:
                        self._take(output)
                    self._changed.notify_all()
        except grpc.aio.AioRpcError as error:
            async with self._changed:
                self.ended = error
                self._changed.notify_all()

    def _take(self, output: session_pb2.SequenceOutput) -> None:
        assert output.sequence_id not in self.finishes, "output after the end"
        tokens = self.tokens.setdefault(output.sequence_id, [])
        if output.token_ids:
            assert output.position == len(tokens), "a token repeated or skipped"
            tokens.extend(output.token_ids)
        if output.finish:
            self.finishes[output.sequence_id] = output.finish
            self.errors[output.sequence_id] = output.error
