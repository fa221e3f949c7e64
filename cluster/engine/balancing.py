"""Evens out what the ranks' routed experts carry, by moving experts while the engine serves."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cluster.engine.asking import all_of, ask_all
from cluster.engine.experts import ExpertWatch
from cluster.engine.means import Means
from cluster.engine.members import Members
from cluster.engine.ranks import RankRefused
from scheduler.experts import ExpertPlacement

__all__ = ["Balancing"]

log = logging.getLogger(__name__)


class Balancing:
    """Of one generation; `epoch` is that of its experts' placement. Every call raises RankLost as its ranks do."""

    def __init__(self, means: Means, members: Members, epoch: int = 0) -> None:
        self._settings = means.settings
        self._pace = means.pace
        self._members = members
        self.watch = ExpertWatch(epoch)

    async def look(self) -> bool:
        """Counts what the groups' tokens chose; whether there are experts to count."""
        answers = await ask_all(self._members.stages, lambda rank: rank.expert_loads(), self._pace.call_timeout_s)
        plan = self._settings.plan
        found = [(plan.place(number).stage, answer) for number, answer in answers.items() if answer is not None]
        if found:
            self.watch.see([[answer for stage, answer in found if stage == n] for n in range(plan.pipeline)])
        return bool(found)

    async def balance(self) -> None:
        """One layer after the other, so that no rank holds much more than it did while its experts change."""
        balance, watch, name = self._settings.expert_balance, self.watch, self._settings.engine
        assert balance is not None
        await self.look()
        before = watch.imbalance
        if before <= balance.threshold:
            return
        try:
            num_hosts = [_num_hosts(self._hosts(stage)) for stage in range(self._settings.plan.pipeline)]
            for stage, layer, placement in list(watch.wanted(num_hosts)):
                await self._move(stage, layer, placement)
        except RankRefused as error:
            log.warning("%s: experts stay where they are: %s", name, error)
        await self.look()
        log.info("%s: expert imbalance was %.2f, is %.2f", name, before, watch.imbalance)

    async def _move(self, stage: int, layer: int, placement: ExpertPlacement) -> None:
        """An epoch is the engine's: other stages' ranks have nothing to read for it, and go along."""
        ranks, load_s, move_s = self._members.ranks, self._settings.load_timeout_s, self._pace.move_timeout_s
        self.watch.epoch += 1
        epoch, plan, places = self.watch.epoch, self._settings.plan, [(layer, placement.slots)]
        calls = {
            number: rank.stage_experts(epoch, places if plan.place(number).stage == stage else ())
            for number, rank in ranks.items()
        }
        await all_of(calls, load_s)
        await ask_all(ranks, lambda rank: rank.switch_experts(epoch, move_s), move_s + self._pace.call_timeout_s)

    def _hosts(self, stage: int) -> list[str]:
        """Of the ranks of a stage, in their order."""
        plan, addresses = self._settings.plan, self._members.addresses
        return [address.host for number, address in addresses.items() if plan.place(number).stage == stage]


def _num_hosts(hosts: Sequence[str]) -> int:
    """Hosts whose ranks are neighbours, equally many on each; 1 where they are not."""
    found = len(set(hosts))
    per_host = len(hosts) // found
    even = len(hosts) % found == 0 and all(
        len(set(hosts[start : start + per_host])) == 1 for start in range(0, len(hosts), per_host)
    )
    return found if even else 1
