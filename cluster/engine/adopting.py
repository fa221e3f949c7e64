"""What lives of the ranks of an earlier leader, where that is at least one whole DP group."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.engine.asking import ask_each
from cluster.engine.means import Means
from cluster.engine.members import Members
from cluster.engine.ranks import Rank
from workers.parallel.plan import ParallelPlan
from workers.report import RankAddress, RankState, RankStatus

__all__ = ["Adopted", "adopt"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adopted:
    """Whole DP groups. They go on `as_it_is`, or must be regrouped first."""

    members: Members
    statuses: Sequence[RankStatus]
    generation: int
    as_it_is: bool


async def adopt(means: Means, *, regroups: bool) -> Adopted | None:
    """Fences what is left of other groups; None, and nothing is left at all, where no group can go on."""
    plan, name = means.settings.plan, means.settings.engine
    ranks = await means.ranks.adopt()
    if not ranks:
        await means.ranks.clear()
        return None
    answers, silent = await ask_each(ranks, lambda rank: rank.status(), means.pace.call_timeout_s)
    for status in answers.values():
        means.newest = max(means.newest, status.generation, status.newest_generation)
    going = (RankState.RUNNING, RankState.INTERRUPTED)
    fit = {number: status for number, status in answers.items() if status.state in going}
    whole = _known(plan, ranks, fit).whole(fit)
    interrupted = any(fit[number].state is RankState.INTERRUPTED for number in whole.ranks)
    as_it_is = len({status.generation for status in fit.values()}) == 1 and not interrupted
    if not whole.ranks or not (as_it_is or regroups):
        log.info("%s: ranks of an earlier leader are not taken over: %s", name, silent or fit)
        await means.ranks.clear()
        return None
    for number in ranks.keys() - whole.ranks.keys():
        lost = answers.get(number)
        await means.ranks.fence(number, None if lost is None else _address(lost))
    statuses = [fit[number] for number in whole.ranks]
    generation = max(status.generation for status in statuses)
    return Adopted(members=whole, statuses=statuses, generation=generation, as_it_is=as_it_is)


def _known(plan: ParallelPlan, ranks: Mapping[int, Rank], statuses: Mapping[int, RankStatus]) -> Members:
    """Members as their statuses tell of them."""
    return Members(
        plan=plan,
        ranks={number: ranks[number] for number in statuses},
        addresses={number: _address(status) for number, status in statuses.items()},
        sessions={plan.place(number).dp_group: one.session for number, one in statuses.items() if one.session},
    )


def _address(status: RankStatus) -> RankAddress:
    return RankAddress(status.rank, status.host, status.plan_port, status.pid)
