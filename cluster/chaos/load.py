"""A load of streams that never lets go: each is followed until its end, and what happened to it is written down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc

from cluster.client.held import BrokenStream, Held
from cluster.client.streams import follow
from protos.shoal.v1 import inference_pb2 as pb

__all__ = ["LEAST_WAIT_S", "Load", "StreamRecord", "Wait", "Work", "reference"]

LEAST_WAIT_S = 0.25  # a shorter wait is the engine's pace, not a pause

Connect = Callable[[], grpc.aio.Channel]
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Work:
    """A request that always has the same answer."""

    prompt: str
    seed: int
    num_tokens: int
    temperature: float = 1.0

    def request(self) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            text=self.prompt,
            sampling=pb.SamplingParams(
                seed=self.seed, max_tokens=self.num_tokens, ignore_eos=True, temperature=self.temperature
            ),
        )


@dataclass(frozen=True, slots=True)
class Wait:
    """No token came for `length_s`."""

    began_s: float
    length_s: float


@dataclass(slots=True)
class StreamRecord:
    """One request as its client saw it. Times are of `time.monotonic`."""

    work: Work
    started_s: float
    ended_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # when, and how many tokens
    waits: list[Wait] = field(default_factory=list)  # for the first token, and for each that was a pause
    error: str = ""
    broken: str = ""  # "repeated" or "skipped"

    @property
    def finished(self) -> bool:
        return self.ended_s is not None and not self.error and not self.broken


async def run_one(
    connect: Connect, work: Work, record: StreamRecord, metadata: Metadata, patience_s: float = 60.0
) -> None:
    """Follows a request to its end."""
    held = Held(work.request())
    last_s = record.started_s
    try:
        async with aclosing(follow(connect, held, metadata=metadata, patience_s=patience_s)) as chunks:
            async for chunk in chunks:
                now_s = time.monotonic()
                if chunk.token_ids:
                    record.arrivals.append((now_s, len(chunk.token_ids)))
                if now_s - last_s >= LEAST_WAIT_S:
                    record.waits.append(Wait(last_s, now_s - last_s))
                last_s = now_s
        if len(held.token_ids[0]) != work.num_tokens:
            record.error = f"ended after {len(held.token_ids[0])} of {work.num_tokens} tokens"
    except BrokenStream as error:
        record.broken = error.kind
    except grpc.aio.AioRpcError as error:
        record.error = f"{error.code().name}: {error.details()}"
    record.token_ids = list(held.token_ids[0])
    record.ended_s = time.monotonic()


async def reference(connect: Connect, works: Sequence[Work], metadata: Metadata) -> Mapping[Work, list[int]]:
    """Every work's answer while nothing disturbs it. Raises RuntimeError where there is none."""
    answers: dict[Work, list[int]] = {}
    for work in works:
        record = StreamRecord(work, time.monotonic())
        await run_one(connect, work, record, metadata)
        if not record.finished:
            raise RuntimeError(f"the server does not answer even undisturbed: {record.error or record.broken}")
        answers[work] = record.token_ids
    return answers


class Load:
    """`num_streams` requests at any time, one after the other on each, until `stop`; then all are finished.

    `turns` gives each stream its way to open channels. `patience_s` is how long a client goes on trying to resume a
    stream that broke; with 0 it does not.
    """

    def __init__(
        self,
        turns: Callable[[], Connect],
        works: Sequence[Work],
        *,
        num_streams: int,
        metadata: Metadata = (),
        patience_s: float = 60.0,
    ) -> None:
        self._turns = turns
        self._works = works
        self._num_streams = num_streams
        self._metadata = metadata
        self._patience_s = patience_s
        self._stopped = False
        self._next = 0
        self.records: list[StreamRecord] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._num_streams):
                tasks.create_task(self._one_after_the_other())

    def stop(self) -> None:
        """No request is begun any more."""
        self._stopped = True

    async def _one_after_the_other(self) -> None:
        connect = self._turns()
        while not self._stopped:
            work = self._works[self._next % len(self._works)]
            self._next += 1
            record = StreamRecord(work, time.monotonic())
            self.records.append(record)
            await run_one(connect, work, record, self._metadata, self._patience_s)
            if record.error:
                await asyncio.sleep(0.2)  # a server that refuses at once is not to be asked in a tight loop
