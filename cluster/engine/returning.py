"""Brings DP groups back that were lost: new processes load beside the others, which serve meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from cluster.engine.asking import ask_all, ask_each
from cluster.engine.means import Means
from cluster.engine.members import Members
from cluster.engine.ranks import Rank, RankLost, RankRefused
from workers.report import RankAddress

__all__ = ["Returning"]

log = logging.getLogger(__name__)


class Returning:
    """One task per missing DP group, from when it is wanted until it is taken."""

    def __init__(self, means: Means, members: Callable[[], Members]) -> None:
        """`members` are those that serve now."""
        self._means = means
        self._settings = means.settings
        self._pace = means.pace
        self._members = members
        self._tasks: dict[int, asyncio.Task[Members]] = {}

    @property
    def joining(self) -> tuple[int, ...]:
        """Ranks that are on their way."""
        size = self._settings.plan.group_size
        return tuple(group * size + n for group in sorted(self._tasks) for n in range(size))

    def want(self, groups: set[int]) -> set[asyncio.Task[Members]]:
        """Begins with what is not under way; the tasks of all, which end when a group is ready to be regrouped."""
        for group in groups - self._tasks.keys():
            self._tasks[group] = asyncio.create_task(self._bring(group), name=f"return of DP group {group}")
        return set(self._tasks.values())

    def take(self) -> Members:
        """The groups that are ready."""
        members = Members(plan=self._settings.plan)
        for group, task in list(self._tasks.items()):
            if task.done():
                members = members.joined(task.result())
                del self._tasks[group]
        return members

    async def end(self) -> None:
        """Gives all of it up."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _check_reach(self, ranks: Mapping[int, Rank], addresses: Sequence[RankAddress]) -> None:
        """Those that serve must not stop for ranks that cannot reach them or each other. Raises RankLost."""
        members, reach_s = self._members(), self._pace.reach_timeout_s
        theirs, timeout_s = [*members.addresses.values(), *addresses], reach_s + self._pace.call_timeout_s
        found = await ask_all(ranks, lambda rank: rank.out_of_reach(theirs, reach_s), timeout_s)
        others, _ = await ask_each(members.ranks, lambda rank: rank.out_of_reach(addresses, reach_s), timeout_s)
        for number, cut in {**found, **others}.items():
            if cut:
                raise RankLost(f"rank {number} cannot reach ranks {cut}")

    async def _bring(self, group: int) -> Members:
        """However often it takes."""
        backoff_s = self._pace.first_backoff_s
        while True:
            try:
                return await self._once(group)
            except (RankLost, RankRefused) as error:
                log.warning("%s: DP group %d does not come back yet: %s", self._settings.engine, group, error)
            await asyncio.sleep(backoff_s)
            backoff_s = min(self._pace.most_backoff_s, backoff_s * 2)

    async def _once(self, group: int) -> Members:
        plan, pace = self._settings.plan, self._pace
        ranks = await self._means.ranks.replace(range(group * plan.group_size, (group + 1) * plan.group_size))
        log.info("%s: DP group %d is on its way", self._settings.engine, group)
        # As long as it takes: there may be no room for it now.
        addresses = dict(zip(ranks, await asyncio.gather(*(rank.open() for rank in ranks.values())), strict=True))
        others = list(addresses.values())
        await self._check_reach(ranks, others)
        generation, store = self._means.next_generation(), await self._means.meeting_place(others)
        await ask_all(ranks, lambda rank: rank.join(generation, store, others), pace.start_timeout_s)
        await ask_all(ranks, lambda rank: rank.load(), self._settings.load_timeout_s)
        log.info("%s: DP group %d is loaded", self._settings.engine, group)
        return Members(plan=plan, ranks=ranks, addresses=addresses)
