"""The open loop: sends each request at its time, whatever has become of the ones before it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loadtest.record import Clock, RequestRecord
from loadtest.workload import Work

__all__ = ["Door", "DoorError", "ModelFacts", "open_loop"]


class DoorError(Exception):
    """The server cannot be asked at all: not there, not ready, or it refuses us."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the server says of the model it serves; zero or empty where a door does not tell."""

    name: str
    max_model_len: int = 0
    vocab_size: int = 0
    dtype: str = ""


class Door(Protocol):
    """One way to ask a server. `generate` never raises for a failed request: the record holds the error."""

    name: str

    async def generate(self, work: Work, intended_s: float) -> RequestRecord: ...

    async def model(self) -> ModelFacts:
        """Raises DoorError where the server does not answer."""
        ...

    async def aclose(self) -> None: ...


async def open_loop(
    send: Callable[[Work, float], Awaitable[RequestRecord]],
    work: Iterable[Work],
    offsets_s: Sequence[float],
    *,
    clock: Clock = time.perf_counter,
    on_record: Callable[[RequestRecord], None] = lambda record: None,
) -> list[RequestRecord]:
    """Sends one request of `work` at each offset from now and waits for all; records come in sending order.

    `clock` must be the clock that `send` stamps its records with.
    """

    async def one(item: Work, intended_s: float) -> RequestRecord:
        record = await send(item, intended_s)
        on_record(record)
        return record

    start_s = clock()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for item, offset_s in zip(work, offsets_s, strict=False):
            intended_s = start_s + offset_s
            delay_s = intended_s - clock()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            tasks.append(group.create_task(one(item, intended_s)))
    return [task.result() for task in tasks]
