"""The chunks of several calls as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cluster.front_door.call import Call, Chunk
from cluster.front_door.http.seam import DeskLike

__all__ = ["Item", "open_all"]

Item = tuple[int, Chunk]
"""Which call, and its chunk."""


def open_all(desk: DeskLike, calls: Sequence[Call]) -> AsyncGenerator[Item, None]:
    """All their chunks as they come; the first error ends all. Close it to end all work."""
    return _one(desk, calls[0]) if len(calls) == 1 else _many(desk, calls)


async def _one(desk: DeskLike, call: Call) -> AsyncGenerator[Item, None]:
    async with aclosing(desk.open(call)) as chunks:
        async for chunk in chunks:
            yield 0, chunk


async def _many(desk: DeskLike, calls: Sequence[Call]) -> AsyncGenerator[Item, None]:
    # As many chunks as calls may wait here: a client that reads slowly holds the desk up, not this queue.
    queue: asyncio.Queue[Item | Exception | None] = asyncio.Queue(maxsize=len(calls))

    async def pump(at: int, call: Call) -> None:
        try:
            async with aclosing(desk.open(call)) as chunks:
                async for chunk in chunks:
                    await queue.put((at, chunk))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(at, call)) for at, call in enumerate(calls)]
    try:
        open_calls = len(tasks)
        while open_calls:
            item = await queue.get()
            if item is None:
                open_calls -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
