"""The leader of one engine: brings the ranks up, watches them, and closes up those that are left when some are lost.

It is never on the way of a token. What it knows is in its ranks, so another leader can take over at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from cluster.engine.adopting import adopt
from cluster.engine.asking import all_of, ask_all, ask_each
from cluster.engine.balancing import Balancing
from cluster.engine.forming import form
from cluster.engine.history import History, Occasion
from cluster.engine.means import Means, StoreHost
from cluster.engine.members import Members
from cluster.engine.pace import Pace
from cluster.engine.ranks import Rank, RankLost, RankRefused, Ranks
from cluster.engine.regroup import NoRoom, Regroup
from cluster.engine.returning import Returning
from cluster.engine.states import EngineEvent, EngineState, after
from cluster.engine.status import engine_status
from cluster.front_door.groups import GroupAddress
from protos.shoal.v1 import admin_pb2
from workers.report import RankState, RankStatus
from workers.settings import EngineSettings

__all__ = ["Leader", "Pace", "StoreHost"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_LOST = 64  # front doors hear of a loss at once, or they find out by themselves


class Leader:
    """One engine's leader. `on_change` is called whenever what it would report has changed."""

    def __init__(
        self,
        settings: EngineSettings,
        ranks: Ranks,
        host_store: Callable[[str], StoreHost],
        on_change: Callable[[], None],
        *,
        generation: int = 0,
        pace: Pace | None = None,
    ) -> None:
        self._settings = settings
        self._ranks = ranks
        self._on_change = on_change
        self._pace = pace or Pace()
        self._means = Means(settings, ranks, self._pace, host_store, newest=generation)
        self._members = Members(plan=settings.plan)
        self._statuses: Sequence[RankStatus] = ()
        self._experts = Balancing(self._means, self._members)
        self.has_looked = False  # at what an earlier leader left: until then nobody knows which groups go on
        self._as_it_was = False  # an earlier leader's engine, taken over while it serves
        self._waits = False  # for ranks without which nobody can go on
        self._history = History()
        self._returning = Returning(self._means, lambda: self._members)
        self.state = EngineState.PLACING
        self.generation = generation
        self.progress = 0.0
        self.error = ""
        self.lost: tuple[str, ...] = ()  # where the last DP groups listened that were given up
        self.refused = False
        self.probed_at_s = 0.0

    async def run(self) -> None:
        """Until it is cancelled, or the engine has failed for good. Cancelling leaves the ranks as they are."""
        starts = 0
        try:
            while self.state is not EngineState.FAILED:
                try:
                    await self._bring_up()
                    starts = 0
                    await self._serve()
                except (RankLost, RankRefused) as error:
                    starts += 1
                    # What has been ready can be again, whatever it says now.
                    if isinstance(error, RankRefused) and self.state is not EngineState.READY:
                        self.refused = True
                        await self._fail(str(error))
                    else:
                        await self._restart(str(error), starts)
        finally:
            await self._returning.end()

    async def drain(self, timeout_s: float) -> None:
        """Lets the ranks finish what they have, at most `timeout_s`."""
        if self.state is EngineState.READY:
            self._advance(EngineEvent.DRAIN)
            firsts, wait_s = self._members.firsts, timeout_s + self._pace.call_timeout_s
            others = {number: rank for number, rank in self._members.ranks.items() if number not in firsts}
            with suppress(RankLost, RankRefused):
                for ranks in (firsts, others):  # which run what the first ones still have
                    await ask_all(ranks, lambda rank: rank.drain(timeout_s), wait_s)

    async def stop(self) -> None:
        """Takes everything down."""
        self._advance(EngineEvent.STOP)
        await self._ranks.clear()

    def groups(self) -> tuple[GroupAddress, ...]:
        """The DP groups that take requests now. While others close up, those that go on do, and what was taken over
        as it was never stopped."""
        going = self.state in (EngineState.READY, EngineState.REGROUPING) or (
            self._as_it_was and self.state is EngineState.PROBING
        )
        if self._waits or not going:
            return ()
        return self._members.groups(self._settings.engine, self.generation)

    def status(self) -> admin_pb2.EngineStatus:
        """For `shoal status`; the groups' loads are the front doors' to fill in."""
        return engine_status(
            self._settings,
            str(self.state),
            self.generation,
            self._members,
            self._statuses,
            self._experts.watch,
            self._returning.joining,
            self._history,
        )

    async def _bring_up(self) -> None:
        if await self._adopt():
            how = ", adopted"
        else:
            how = ""
            await self._form()
        if self.state is not EngineState.READY:
            await self._first_probe(adopted=bool(how))
        log.info("%s is ready (generation %d%s)", self._settings.engine, self.generation, how)

    @property
    def _regroups(self) -> bool:
        """Whether groups go on without those that are lost."""
        return self._settings.plan.data > 1

    async def _first_probe(self, *, adopted: bool) -> None:
        try:
            await self._probe()
            self._statuses = await self._ask_statuses()
        except (RankLost, RankRefused) as error:
            if not adopted or not self._regroups:
                raise
            await self._regroup(Occasion.TAKEN_OVER, str(error), self._members)
            return
        self.progress = 1.0
        self.error = ""
        self._advance(EngineEvent.ANSWERED)

    async def _adopt(self) -> bool:
        """Takes over what lives of the ranks of an earlier leader."""
        found = await adopt(self._means, regroups=self._regroups)
        self.has_looked = True
        if found is None:
            return False
        self._members, self._statuses, self.generation = found.members, found.statuses, found.generation
        self._experts = Balancing(self._means, found.members)
        self._as_it_was = found.as_it_is
        if found.as_it_is:
            self._advance(EngineEvent.ADOPTED)
        else:
            await self._regroup(Occasion.TAKEN_OVER, "the leader died while ranks were lost", found.members)
        return True

    async def _form(self) -> None:
        self.generation = self._means.next_generation()
        self.progress = 0.0
        self._as_it_was = False
        self._members = Members(plan=self._settings.plan)
        self._members = await form(self._means, self.generation, self._advance, self._note_progress)
        self._experts = Balancing(self._means, self._members)

    def _note_progress(self, progress: float) -> None:
        self.progress = progress
        self._on_change()

    async def _serve(self) -> None:
        """Until no DP group is left to go on: RankLost."""
        while True:
            try:
                joining = await self._keep()
                occasion, cause = Occasion.RETURNED, "ranks " + ", ".join(map(str, joining.ranks)) + " are back"
            except (RankLost, RankRefused) as error:
                if not self._regroups:
                    raise
                occasion, joining, cause = Occasion.LOST, Members(plan=self._settings.plan), str(error)
            await self._regroup(occasion, cause, self._members.joined(joining))

    async def _keep(self) -> Members:
        """Renews the ranks' leases and asks for a token now and then; the groups that have come back meanwhile.

        Raises RankLost where ranks are lost, or can run no step any more.
        """
        ranks, generation = self._members.ranks, self.generation
        returning = self._returning.want(self._members.missing_groups)
        tasks = {asyncio.create_task(rank.lost()) for rank in ranks.values()}
        tasks |= {asyncio.create_task(_troubled(rank, number, generation)) for number, rank in ranks.items()}
        tasks.add(asyncio.create_task(self._every(self._pace.renew_every_s, self._renew)))
        tasks.add(asyncio.create_task(self._every(self._pace.probe_every_s, self._probe)))
        if self._settings.plan.data > 1:
            tasks.add(asyncio.create_task(self._every(self._pace.look_every_s, self._look)))
        if self._regroups and (balance := self._settings.expert_balance):
            tasks.add(asyncio.create_task(self._every(balance.interval_s, self._experts.balance)))
        try:
            done, _ = await asyncio.wait(tasks | returning, return_when=asyncio.FIRST_COMPLETED)
            for task in done & tasks:
                task.result()
            return self._returning.take()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _regroup(self, occasion: Occasion, cause: str, members: Members) -> None:
        """Raises RankLost where nobody is left, or it does not succeed."""
        log.warning("%s: regrouping: %s", self._settings.engine, cause)
        started_s = asyncio.get_running_loop().time()
        self.error = cause
        self._advance(EngineEvent.INTERRUPTED)
        regroup = Regroup(self._means, self._left)
        while True:
            try:
                done = await regroup.run(members)
                break
            except NoRoom as error:
                self._left(error.members)  # and those that have come in stay
                members = self._members.joined(await self._wait_for_ranks(str(error)))
        self._waits = False
        self._members, self.generation = done.members, done.generation
        self._experts = Balancing(self._means, done.members, done.epoch)
        # Whoever does not answer now shows as soon as the members are watched again.
        answers, _ = await ask_each(done.members.ranks, lambda rank: rank.status(), self._pace.answer_timeout_s)
        self._statuses = list(answers.values())
        seconds = asyncio.get_running_loop().time() - started_s
        self._history.regrouped(occasion, cause, seconds)
        self.progress, self.error = 1.0, ""
        log.warning(
            "%s: generation %d of ranks %s after %.2f s, %d bytes of experts read",
            self._settings.engine,
            self.generation,
            list(done.members.ranks),
            seconds,
            done.bytes_read,
        )
        self._advance(EngineEvent.REGROUPED)

    def _left(self, members: Members) -> None:
        """Those that were lost leave the roster at once: what they were answering is answered elsewhere."""
        sessions = {group: one for group, one in self._members.sessions.items() if group in members.sessions}
        gone = [one for group, one in self._members.sessions.items() if group not in sessions]
        self.lost = (*self.lost, *gone)[-_MOST_LOST:]
        self._members = Members(plan=members.plan, ranks=members.ranks, addresses=members.addresses, sessions=sessions)
        self._on_change()

    async def _wait_for_ranks(self, reason: str) -> Members:
        """The members hold what they have until others come back, or another of them is lost."""
        if not self._members.missing:
            raise RankLost(reason)
        self._waits = True
        self.error = f"the experts of ranks {list(self._members.missing)} fit nowhere until these are back: {reason}"
        log.error("%s: %s", self._settings.engine, self.error)
        self._on_change()
        watching = {asyncio.create_task(rank.lost()) for rank in self._members.ranks.values()}
        watching.add(asyncio.create_task(self._every(self._pace.renew_every_s, self._renew_leases)))
        try:
            returning = self._returning.want(self._members.missing_groups)
            await asyncio.wait(returning | watching, return_when=asyncio.FIRST_COMPLETED)
            return self._returning.take()
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    async def _every(self, period_s: float, act: Callable[[], Awaitable[object]]) -> None:
        while True:
            await asyncio.sleep(period_s)
            await act()

    async def _renew_leases(self) -> None:
        """Whoever does not answer shows elsewhere."""
        lease_s = self._pace.rank_lease_s
        await ask_each(self._members.ranks, lambda rank: rank.renew(lease_s), self._pace.call_timeout_s)

    async def _renew(self) -> None:
        """Also asks how the ranks are: one whose group has failed answers, and runs no step any more."""
        owed, lease_s = self._means.owed, self._pace.rank_lease_s
        renewals = {
            number: owed.by(number, rank, lambda rank: rank.renew(lease_s))
            for number, rank in self._members.ranks.items()
        }
        await all_of(renewals, self._pace.call_timeout_s)
        self._statuses = await self._ask_statuses()
        for status in self._statuses:
            if status.state is not RankState.RUNNING:
                raise RankLost(f"rank {status.rank} is {status.state}" + f": {status.reason}" * bool(status.reason))

    async def _ask_statuses(self) -> Sequence[RankStatus]:
        return list((await self._all(lambda rank: rank.status(), self._pace.call_timeout_s)).values())

    async def _probe(self) -> None:
        timeout_s = self._pace.probe_timeout_s
        await ask_all(self._members.firsts, lambda rank: rank.probe(timeout_s), timeout_s + self._pace.call_timeout_s)
        self.probed_at_s = asyncio.get_running_loop().time()

    async def _look(self) -> None:
        if await self._experts.look():
            self._on_change()

    async def _restart(self, reason: str, starts: int) -> None:
        """Where no DP group can go on without the lost ranks: what the others hold is of no use then."""
        if starts > self._pace.max_starts:
            await self._fail(f"gave up after {starts - 1} starts, the last of which ended so: {reason}")
            return
        log.warning("%s: %s; starting all ranks again", self._settings.engine, reason)
        self.error = reason
        self._waits = False
        self._history.restarted(reason)
        self._advance(EngineEvent.LOST)
        await self._returning.end()
        await self._ranks.clear()
        self._means.owed.forget(range(self._settings.plan.num_ranks))
        if starts > 1:
            await asyncio.sleep(min(self._pace.most_backoff_s, self._pace.first_backoff_s * 2 ** (starts - 2)))
        self._advance(EngineEvent.CLEARED)

    async def _fail(self, reason: str) -> None:
        log.error("%s cannot be served: %s", self._settings.engine, reason)
        self.error = reason
        await self._ranks.clear()
        self._advance(EngineEvent.REFUSED)

    async def _all(self, ask: Callable[[Rank], Awaitable[T]], timeout_s: float) -> dict[int, T]:
        """Every member's answer. The first failure counts, and silence is one."""
        return await ask_all(self._members.ranks, ask, timeout_s)

    def _advance(self, event: EngineEvent) -> None:
        before, self.state = self.state, after(self.state, event)
        if self.state is not before:
            log.info("%s: %s after %s", self._settings.engine, self.state, before)
        self._on_change()


async def _troubled(rank: Rank, number: int, generation: int) -> None:
    reason = await rank.trouble(generation)
    raise RankLost(f"rank {number} was interrupted: {reason}")
