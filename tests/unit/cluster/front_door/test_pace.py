"""Chunks of one call keep a distance; nothing is held back that need not be."""

from __future__ import annotations

import asyncio

import pytest

from cluster.front_door.call import Call, Chunk, SamplingOptions
from cluster.front_door.errors import Unavailable
from cluster.front_door.limits import Limits
from protos.shoal.v1 import session_pb2 as pb
from tests.unit.cluster.front_door.support import Bench, bench, turns

GAP_S = 0.005


class _Reading:
    """A call of `n` choices, and what its reader has been given so far."""

    def __init__(self, it: Bench, n: int) -> None:
        self.it = it
        self.chunks: list[Chunk] = []
        call = Call(text="hi", request_id="r", sampling=SamplingOptions(max_tokens=100, n=n))
        self.task = asyncio.create_task(self._read(call))

    async def _read(self, call: Call) -> None:
        async for chunk in self.it.desk.open(call):
            self.chunks.append(chunk)

    async def texts(self) -> list[str]:
        await turns()
        return [chunk.text for chunk in self.chunks]


async def _begin(n: int = 1) -> tuple[Bench, _Reading, list[pb.Submit]]:
    it = bench(("engine/0",), limits=Limits(min_chunk_gap_s=GAP_S))
    reading = _Reading(it, n)
    await turns()
    return it, reading, it.link().submits


async def test_tokens_that_come_too_fast_share_a_chunk() -> None:
    it, reading, (submit,) = await _begin()
    it.link().answer(submit, "a")
    assert await reading.texts() == ["a"], "the first goes at once"
    it.link().answer(submit, "b")
    it.link().answer(submit, "c")
    assert await reading.texts() == ["a"]
    it.clock.advance(GAP_S / 2)
    it.link().answer(submit, "d")
    assert await reading.texts() == ["a"]
    it.clock.advance(GAP_S / 2)
    assert await reading.texts() == ["a", "bcd"]
    it.clock.advance(GAP_S)
    it.link().answer(submit, "e")
    assert await reading.texts() == ["a", "bcd", "e"], "what comes slowly goes at once"
    reading.task.cancel()


async def test_the_last_chunk_does_not_wait() -> None:
    it, reading, (submit,) = await _begin()
    it.link().answer(submit, "a")
    await turns()
    it.link().answer(submit, "b")
    await turns()
    it.link().answer(submit, "c", finish=pb.FINISH_LENGTH)
    assert await reading.texts() == ["a", "bc"]
    await reading.task


async def test_choices_are_given_together() -> None:
    it, reading, submits = await _begin(n=3)
    for submit in submits:
        it.link().answer(submit, "a")
    assert await reading.texts() == ["a", "a", "a"]
    for submit in submits:
        it.link().answer(submit, "b")
    assert await reading.texts() == ["a", "a", "a"]
    it.clock.advance(GAP_S)
    assert await reading.texts() == ["a", "a", "a", "b", "b", "b"]
    reading.task.cancel()


async def test_a_failure_does_not_wait_and_comes_last() -> None:
    it, reading, (submit,) = await _begin()
    it.link().answer(submit, "a")
    await turns()
    it.link().answer(submit, "b")
    await turns()
    it.desk._open[("", "r")].fail(Unavailable("no"))
    assert await reading.texts() == ["a", "b"]
    with pytest.raises(Unavailable, match="no"):
        await reading.task
