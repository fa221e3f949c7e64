"""The cheapest client that still proves what it got: bytes first, messages once the clock has stopped.

On a small machine the client and the server share the cores, so every microsecond spent in the client makes a fast
server look slower than it is, and hides the difference between two servers.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc

from loadtest.grpc_door import generate_request, read_chunk
from loadtest.record import Recorder
from loadtest.workload import Work
from protos.shoal.v1 import inference_pb2 as pb

__all__ = ["Burst", "RawStreams"]


@dataclass(frozen=True, slots=True)
class Burst:
    """What some streams, opened together, came to."""

    num_tokens: int
    num_messages: int
    duration_s: float
    first_s: tuple[float, ...]  # from sending to the first message with a token, of each stream


class RawStreams:
    """One channel to a `Generate` method."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._generate = self._channel.unary_stream(
            "/shoal.v1.Inference/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=None,
        )

    async def close(self) -> None:
        await self._channel.close(None)

    async def burst(self, work: Work, num_streams: int) -> Burst:
        """Asks for the same work `num_streams` times at once. Raises RuntimeError where an answer is not whole."""
        started_s = time.perf_counter()
        answers = await asyncio.gather(*(self._one(work) for _ in range(num_streams)))
        duration_s = time.perf_counter() - started_s
        return Burst(
            num_tokens=sum(_check(work, answer) for answer in answers),
            num_messages=sum(len(answer) for answer in answers),
            duration_s=duration_s,
            first_s=tuple(answer[0][0] for answer in answers),
        )

    async def _one(self, work: Work) -> list[tuple[float, bytes]]:
        request = generate_request(work)
        sent_s = time.perf_counter()
        return [(time.perf_counter() - sent_s, data) async for data in self._generate(request)]


def _check(work: Work, answer: list[tuple[float, bytes]]) -> int:
    """The number of tokens in an answer, all of them there and in their places."""
    recorder = Recorder("grpc", work, 0.0, lambda: 0.0)
    for _, data in answer:
        read_chunk(recorder, pb.GenerateChunk.FromString(data))
    record = recorder.close()
    if record.error:
        raise RuntimeError(f"a stream was not whole: {record.error}")
    return record.num_output_tokens
