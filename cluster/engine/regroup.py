"""One regroup: from members of which some may be dead, frozen or out of reach to a generation of those that live.

    who answers?     the others are fenced; DP groups that are no longer whole go, and with them their ranks
    interrupt        every rank's step ends or fails, its groups are left; sequences, cache and experts stay; of ranks
                     that cannot reach each other one side is fenced
    regroup          all meet anew; what experts only lost ranks held is read by the others
    start            the interrupted steps are run again

A rank that is lost meanwhile makes the attempt fail, and another one begins with those that live then, in a newer
generation. All of it can be begun again by another leader at any point.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.engine.asking import all_of, ask_all, ask_each, each_of
from cluster.engine.means import Means
from cluster.engine.members import Members
from cluster.engine.partition import to_fence
from cluster.engine.ranks import ExpertPlaces, Rank, RankLost, RankRefused
from scheduler.experts_regroup import regrouped
from workers.parallel.plan import ParallelPlan
from workers.report import Holdings, RankAddress, RankState, RankStatus

__all__ = ["NoRoom", "Regroup", "Regrouped"]

log = logging.getLogger(__name__)


class NoRoom(Exception):
    """The memory of the `members` that are left does not take the experts of those that are missing."""

    def __init__(self, reason: str, members: Members) -> None:
        super().__init__(reason)
        self.members = members


@dataclass(frozen=True, kw_only=True, slots=True)
class Regrouped:
    """What came of it; `epoch` numbers the experts' placement, `bytes_read` of them had to be read."""

    members: Members
    generation: int
    epoch: int
    bytes_read: int


class Regroup:
    """`on_members` hears at once who is left."""

    def __init__(self, means: Means, on_members: Callable[[Members], None]) -> None:
        self._means = means
        self._settings = means.settings
        self._pace = means.pace
        self._on_members = on_members
        self._redundant = means.settings.plan.redundant_experts
        self._fenced: set[int] = set()

    async def run(self, members: Members) -> Regrouped:
        """Raises RankLost where no DP group is left or no attempt succeeds, NoRoom where more ranks are needed."""
        reason = ""
        self._fenced.clear()
        for attempt in range(self._pace.max_regroups):
            if attempt:
                log.warning("%s: regrouping failed: %s; trying again", self._settings.engine, reason)
            members = await self._living(members)
            try:
                return await self._once(members)
            except RankLost as error:
                reason = str(error)
            except RankRefused as error:
                if not self._redundant:
                    raise NoRoom(str(error), members) from None
                self._redundant, reason = 0, str(error)
        raise RankLost(f"{self._pace.max_regroups} attempts to regroup failed, the last so: {reason}")

    async def _living(self, members: Members) -> Members:
        """The DP groups that are whole. What does not answer, or cannot go on, is fenced."""
        left = {number: rank for number, rank in members.ranks.items() if number not in self._fenced}
        answers, lost = await self._ask_statuses(left)
        for number, status in answers.items():
            if status.state in (RankState.BROKEN, RankState.STOPPED):
                lost[number] = f"rank {number} is {status.state}: {status.reason}"
        whole = members.whole(left.keys() - lost.keys())
        for number in left.keys() - lost.keys() - whole.ranks.keys():
            lost[number] = f"rank {number} is left of a DP group that is not whole"
        if lost:
            self._on_members(whole)
            await self._fence(members, lost)
        if not whole.ranks:
            raise RankLost("no DP group is left whole: " + "; ".join(lost.values()))
        return whole

    async def _ask_statuses(self, ranks: Mapping[int, Rank]) -> tuple[dict[int, RankStatus], dict[int, str]]:
        """Whoever has long owed the leader an answer too, beside its peers, gets less time for this one."""
        pace, owed = self._pace, self._means.owed
        doubted = {number for number in ranks if owed.for_s(number) >= pace.answer_timeout_s}
        calls = {number: owed.by(number, rank, lambda rank: rank.status()) for number, rank in ranks.items()}
        (answers, lost), (late_answers, more_lost) = await asyncio.gather(
            each_of({number: call for number, call in calls.items() if number not in doubted}, pace.answer_timeout_s),
            each_of({number: call for number, call in calls.items() if number in doubted}, pace.doubted_timeout_s),
        )
        return answers | late_answers, lost | more_lost

    async def _fence(self, members: Members, lost: Mapping[int, str]) -> None:
        for reason in lost.values():
            log.warning("%s: %s", self._settings.engine, reason)
        self._fenced |= lost.keys()
        self._means.owed.forget(lost)
        await asyncio.gather(*(self._means.ranks.fence(number, members.addresses.get(number)) for number in lost))

    async def _once(self, members: Members) -> Regrouped:
        pace, ranks = self._pace, members.ranks
        generation = self._means.next_generation()
        addresses = list(members.addresses.values())
        holdings, lost = await self._at_rest(members, generation, addresses)
        if lost:
            self._on_members(members.whole(ranks.keys() - lost.keys()))
            await self._fence(members, lost)
            raise RankLost("; ".join(lost.values()))
        epoch = 1 + max(holding.epoch for holding in holdings.values())
        placements = _placements(members.plan, holdings, self._redundant)
        store = await self._means.meeting_place(addresses)
        calls = {
            number: rank.regroup(generation, store, addresses, epoch, placements[members.plan.place(number).stage])
            for number, rank in ranks.items()
        }
        read = await all_of(calls, self._settings.load_timeout_s)
        started = await ask_all(ranks, lambda rank: rank.start(), pace.start_timeout_s)
        return Regrouped(
            members=members.started(started),
            generation=generation,
            epoch=epoch,
            bytes_read=sum(read.values()),
        )

    async def _at_rest(
        self, members: Members, generation: int, addresses: Sequence[RankAddress]
    ) -> tuple[dict[int, Holdings], dict[int, str]]:
        """What the ranks hold once their steps have come to rest, and who is lost meanwhile, and why.

        Steps of ranks that are cut off from each other wait for what never comes, until one side is fenced: as soon as
        all ranks have said whom they reach, nobody waits for such steps.
        """
        pace, ranks = self._pace, members.ranks
        rest_s, reach_s = pace.rest_timeout_s, pace.reach_timeout_s
        timeout_s = rest_s + pace.answer_timeout_s
        resting = asyncio.create_task(ask_each(ranks, lambda rank: rank.interrupt(generation, rest_s), timeout_s))
        try:
            cuts, silent = await ask_each(ranks, lambda rank: rank.out_of_reach(addresses, reach_s), timeout_s)
            apart = to_fence(members.plan, {number: set(others) for number, others in cuts.items()})
            if apart and not silent and not resting.done():
                return {}, apart
            holdings, lost = await resting
        finally:
            resting.cancel()
        return holdings, silent | lost or apart


def _placements(plan: ParallelPlan, holdings: Mapping[int, Holdings], redundant: int) -> list[list[ExpertPlaces]]:
    """By stage, of every layer with experts, from what each of its ranks holds; empty where ranks share none."""
    stages: list[list[Holdings]] = [[] for _ in range(plan.pipeline)]
    for number, holding in sorted(holdings.items()):
        stages[plan.place(number).stage].append(holding)
    return [_of_stage(stage, redundant) for stage in stages]


def _of_stage(holdings: Sequence[Holdings], redundant: int) -> list[ExpertPlaces]:
    first, found = holdings[0], []
    for index, layer in enumerate(first.layers):
        held = [holding.experts[index] for holding in holdings]
        placement = regrouped(held, first.num_experts, num_slots=first.num_experts + redundant)
        found.append((layer, placement.slots))
    return found
