"""Asks many ranks at once, and remembers who owes an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

from cluster.engine.ranks import Rank, RankLost, RankRefused

__all__ = ["Owed", "all_of", "ask_all", "ask_each", "each_of"]

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
    return await each_of({number: ask(rank) for number, rank in ranks.items()}, timeout_s)


async def each_of(calls: Mapping[int, Awaitable[T]], timeout_s: float) -> tuple[dict[int, T], dict[int, str]]:
    """The same of calls that differ, by rank."""
    tasks = {number: asyncio.ensure_future(call) for number, call in calls.items()}
    try:
        if tasks:
            await asyncio.wait(tasks.values(), timeout=timeout_s)
    finally:
        for task in tasks.values():
            task.cancel()
    answers: dict[int, T] = {}
    failures: dict[int, str] = {}
    for number, task in tasks.items():
        if not task.done():
            failures[number] = f"rank {number} did not answer in {timeout_s:g} s"
            continue
        try:
            answers[number] = task.result()
        except (RankLost, RankRefused) as error:
            failures[number] = str(error)
    return answers, failures


class Owed:
    """Since when ranks owe an answer. A call that was given up still counts, until the rank answers another."""

    def __init__(self) -> None:
        self._since_s: dict[int, float] = {}

    async def by(self, number: int, rank: Rank, ask: Callable[[Rank], Awaitable[T]]) -> T:
        """The rank's answer."""
        self._since_s.setdefault(number, asyncio.get_running_loop().time())
        answer = await ask(rank)
        self._since_s.pop(number, None)
        return answer

    def for_s(self, number: int) -> float:
        """How long it has owed; 0 where it owes nothing."""
        now_s = asyncio.get_running_loop().time()
        return now_s - self._since_s.get(number, now_s)

    def forget(self, numbers: Iterable[int]) -> None:
        """They live no more; other processes may be those ranks next."""
        for number in numbers:
            self._since_s.pop(number, None)
