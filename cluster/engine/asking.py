"""Asks many ranks at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from cluster.engine.ranks import Rank, RankLost, RankRefused

__all__ = ["all_of", "ask_all", "ask_each"]

T = TypeVar("T")


async def ask_all(ranks: Mapping[int, Rank], ask: Callable[[Rank], Awaitable[T]], timeout_s: float) -> dict[int, T]:
    """Every rank's answer. The first failure counts, and silence is one (RankLost)."""
    return await all_of({number: ask(rank) for number, rank in ranks.items()}, timeout_s)


async def all_of(calls: Mapping[int, Awaitable[T]], timeout_s: float) -> dict[int, T]:
    """The same of calls that differ, by rank."""
    tasks = {number: asyncio.ensure_future(call) for number, call in calls.items()}
    try:
        async with asyncio.timeout(timeout_s):
            answers = await asyncio.gather(*tasks.values())
    except TimeoutError:
        silent = [number for number, task in tasks.items() if not task.done() or task.cancelled()]
        raise RankLost(f"no answer from ranks {silent} in {timeout_s:g} s") from None
    finally:
        for task in tasks.values():
            task.cancel()
    return dict(zip(tasks, answers, strict=True))


async def ask_each(
    ranks: Mapping[int, Rank], ask: Callable[[Rank], Awaitable[T]], timeout_s: float
) -> tuple[dict[int, T], dict[int, str]]:
    """The answers that came, and why the others did not."""
    tasks = {number: asyncio.ensure_future(ask(rank)) for number, rank in ranks.items()}
    if tasks:
        await asyncio.wait(tasks.values(), timeout=timeout_s)
    answers: dict[int, T] = {}
    failures: dict[int, str] = {}
    for number, task in tasks.items():
        if not task.done():
            task.cancel()
            failures[number] = f"rank {number} did not answer in {timeout_s:g} s"
            continue
        try:
            answers[number] = task.result()
        except (RankLost, RankRefused) as error:
            failures[number] = str(error)
    return answers, failures
