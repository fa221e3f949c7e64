"""A DP group's stream used directly, as a front door uses it: what time to first token is without the front door."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import grpc

from protos.shoal.v1 import inference_pb2, session_pb2, session_pb2_grpc

__all__ = ["GroupStream"]


class GroupStream:
    """One Connect stream, one sequence at a time."""

    def __init__(self, address: str, secret: str = "") -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._call: Any = session_pb2_grpc.DPGroupStub(self._channel).Connect(  # type: ignore[call-arg]  # write() feeds it
            metadata=(("shoal-secret", secret),)
        )
        self._numbers = itertools.count(1)

    async def open(self) -> None:
        """Says hello and waits for the group's first message."""
        await self._call.write(session_pb2.Uplink(hello=session_pb2.Hello(front_door_id="direct")))
        await self._call.read()

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close(None)

    async def ttft_s(self, prompt: Sequence[int]) -> float:
        """From submit to the message with the first token, of a sequence of one token."""
        submit = session_pb2.Submit(
            sequence_id=next(self._numbers),
            prompt_token_ids=prompt,
            sampling=inference_pb2.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        )
        sent_s = time.perf_counter()
        await self._call.write(session_pb2.Uplink(submit=submit))
        downlink: session_pb2.Downlink = await self._call.read()
        first_s = time.perf_counter() - sent_s
        assert downlink.outputs[0].sequence_id == submit.sequence_id
        return first_s
