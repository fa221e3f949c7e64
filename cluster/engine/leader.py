"""The leader of one engine: brings the ranks up, watches them, and starts them again when one is lost.

It is never on the way of a token. What it knows is in its ranks, so another leader can take over at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cluster.engine.experts import ExpertWatch
from cluster.engine.ranks import Rank, RankLost, RankRefused, Ranks
from cluster.engine.states import EngineEvent, EngineState, after
from cluster.front_door.groups import GroupAddress
from protos.shoal.v1 import admin_pb2
from scheduler.experts import ExpertPlacement
from workers.report import RankAddress, RankState, RankStatus
from workers.settings import EngineSettings

__all__ = ["Leader", "Pace", "StoreHost"]

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How often the leader looks, and how long it waits."""

    renew_every_s: float = 1.0
    rank_lease_s: float = 30.0
    probe_every_s: float = 5.0
    probe_timeout_s: float = 20.0
    call_timeout_s: float = 10.0
    start_timeout_s: float = 120.0
    progress_every_s: float = 0.5
    look_every_s: float = 5.0
    move_timeout_s: float = 30.0
    first_backoff_s: float = 0.5
    most_backoff_s: float = 15.0
    max_starts: int = 5  # in a row, without becoming ready


class StoreHost(Protocol):
    """Where ranks meet; lives as long as the object."""

    host: str
    port: int


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
        self._host_store = host_store
        self._on_change = on_change
        self._pace = pace or Pace()
        self._store: StoreHost | None = None
        self._members: Sequence[Rank] = ()
        self._sessions: tuple[str, ...] = ()
        self._statuses: Sequence[RankStatus] = ()
        self._experts = ExpertWatch()
        self.state = EngineState.PLACING
        self.generation = generation
        self.progress = 0.0
        self.error = ""
        self.refused = False
        self.probed_at_s = 0.0

    async def run(self) -> None:
        """Until it is cancelled, or the engine has failed for good. Cancelling leaves the ranks as they are."""
        starts = 0
        while True:
            try:
                await self._bring_up()
                starts = 0
                await self._keep()
            except (RankLost, RankRefused) as error:
                starts += 1
                # What has been ready can be again, whatever it says now.
                if isinstance(error, RankRefused) and self.state is not EngineState.READY:
                    self.refused = True
                    await self._fail(str(error))
                else:
                    await self._restart(str(error), starts)
            if self.state is EngineState.FAILED:
                return

    async def drain(self, timeout_s: float) -> None:
        """Lets the ranks finish what they have, at most `timeout_s`."""
        if self.state is EngineState.READY:
            self._advance(EngineEvent.DRAIN)
            with suppress(RankLost, RankRefused):
                await self._all(lambda rank: rank.drain(timeout_s), timeout_s + self._pace.call_timeout_s)

    async def stop(self) -> None:
        """Takes everything down."""
        self._advance(EngineEvent.STOP)
        await self._ranks.clear()

    def groups(self) -> tuple[GroupAddress, ...]:
        """The DP groups that take requests now."""
        if self.state is not EngineState.READY:
            return ()
        engine, generation = self._settings.engine, self.generation
        return tuple(_group(engine, index, generation, target) for index, target in enumerate(self._sessions))

    def status(self) -> admin_pb2.EngineStatus:
        """For `shoal status`; the groups' loads are the front doors' to fill in."""
        settings = self._settings
        status = admin_pb2.EngineStatus(
            name=settings.engine,
            state=self.state,
            generation=self.generation,
            plan=str(settings.plan),
            dtype=settings.dtype,
            quantization=settings.quantization,
        )
        for index, target in enumerate(self._sessions):
            status.dp_groups.add(index=index, address=target)
        if self._statuses:
            status.collectives = self._statuses[0].collectives
            status.kernels = self._statuses[0].kernels
            status.dispatch = self._statuses[0].dispatch
            status.load_s = max(report.load_s for report in self._statuses)
        tokens = self._experts.rank_tokens
        if tokens:
            status.expert_imbalance, status.expert_epoch = self._experts.imbalance, self._experts.epoch
        for report in self._statuses:
            # With experts that move there is one stage, whose ranks are all there are.
            _add_rank(status, report, tokens[report.rank] if tokens else 0.0)
        return status

    async def _bring_up(self) -> None:
        adopted = await self._adopt()
        if not adopted:
            await self._form()
        await self._probe()
        self._statuses = await self._all(lambda rank: rank.status(), self._pace.call_timeout_s)
        self.progress = 1.0
        self.error = ""
        self._advance(EngineEvent.ANSWERED)
        log.info("%s is ready (generation %d%s)", self._settings.engine, self.generation, ", adopted" * adopted)

    async def _adopt(self) -> bool:
        """Takes over the ranks of an earlier leader, if all of them run in one generation."""
        members = await self._ranks.adopt()
        if not members:
            await self._ranks.clear()
            return False
        self._members = members
        try:
            statuses = await self._all(lambda rank: rank.status(), self._pace.call_timeout_s)
        except (RankLost, RankRefused) as error:
            log.info("%s: ranks of an earlier leader are not taken over: %s", self._settings.engine, error)
            statuses = ()
        generations = {status.generation for status in statuses}
        if not statuses or len(generations) > 1 or any(status.state is not RankState.RUNNING for status in statuses):
            await self._ranks.clear()
            return False
        self.generation = generations.pop()
        self._sessions = tuple(status.session for status in statuses if status.session)
        self._advance(EngineEvent.ADOPTED)
        return True

    async def _form(self) -> None:
        """Places, joins, loads and starts all ranks in a new generation."""
        pace = self._pace
        self.generation += 1
        self.progress = 0.0
        self._experts = ExpertWatch()
        self._sessions = ()
        self._members = await self._ranks.place()
        addresses = await self._all(lambda rank: rank.open(), pace.start_timeout_s)
        self._advance(EngineEvent.PLACED)
        store = await self._meeting_place(addresses)
        await self._all(lambda rank: rank.join(self.generation, store, addresses), pace.start_timeout_s)
        self._advance(EngineEvent.JOINED)
        await self._load()
        self._advance(EngineEvent.LOADED)
        sessions = await self._all(lambda rank: rank.start(), pace.start_timeout_s)
        self._sessions = tuple(session for session in sessions if session)

    async def _meeting_place(self, addresses: Sequence[RankAddress]) -> tuple[str, int]:
        """One rank meets nobody. The store outlives generations; each has its own part of it."""
        if len(addresses) == 1:
            return addresses[0].host, 0
        if self._store is None:
            self._store = await asyncio.to_thread(self._host_store, addresses[0].host)
        return self._store.host, self._store.port

    async def _load(self) -> None:
        loading = asyncio.create_task(self._all(lambda rank: rank.load(), self._settings.load_timeout_s))
        try:
            while not loading.done():
                await asyncio.wait({loading}, timeout=self._pace.progress_every_s)
                counts = await self._all(lambda rank: rank.load_progress(), self._pace.start_timeout_s)
                whole = sum(total for _, total in counts)
                self.progress = sum(done for done, _ in counts) / whole if whole else 0.0
                self._on_change()
        finally:
            if not loading.done():
                loading.cancel()
        await loading

    async def _keep(self) -> None:
        """Renews the ranks' leases and asks for a token now and then; ends by RankLost."""
        watch = [asyncio.create_task(rank.lost()) for rank in self._members]
        renewing = asyncio.create_task(self._every(self._pace.renew_every_s, self._renew))
        probing = asyncio.create_task(self._every(self._pace.probe_every_s, self._probe))
        tasks = {*watch, renewing, probing}
        if self._settings.plan.data > 1:
            tasks.add(asyncio.create_task(self._every(self._pace.look_every_s, self._look_at_experts)))
            if balance := self._settings.expert_balance:
                tasks.add(asyncio.create_task(self._every(balance.interval_s, self._balance_experts)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _every(self, period_s: float, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(period_s)
            await act()

    async def _renew(self) -> None:
        """Also asks how the ranks are: one whose group has failed answers, and runs no step any more."""
        await self._all(lambda rank: rank.renew(self._pace.rank_lease_s), self._pace.call_timeout_s)
        self._statuses = await self._all(lambda rank: rank.status(), self._pace.call_timeout_s)
        for status in self._statuses:
            if status.state is not RankState.RUNNING:
                raise RankLost(f"rank {status.rank} is {status.state}" + f": {status.reason}" * bool(status.reason))

    async def _probe(self) -> None:
        timeout_s = self._pace.probe_timeout_s
        leaders = self._members[:: self._settings.plan.group_size]
        await self._all(lambda rank: rank.probe(timeout_s), timeout_s + self._pace.call_timeout_s, leaders)
        self.probed_at_s = asyncio.get_running_loop().time()

    async def _look_at_experts(self) -> None:
        firsts = self._members[:: self._settings.plan.group_size]
        answers = await self._all(lambda rank: rank.expert_loads(), self._pace.call_timeout_s, firsts)
        reports = [answer for answer in answers if answer is not None]
        if reports:
            self._experts.see(reports)
            self._on_change()

    async def _balance_experts(self) -> None:
        """One layer after the other, so that no rank holds much more than it did while its experts change."""
        balance = self._settings.expert_balance
        assert balance is not None
        await self._look_at_experts()
        before = self._experts.imbalance
        if before <= balance.threshold:
            return
        try:
            for layer, placement in list(self._experts.wanted(_num_hosts([s.host for s in self._statuses]))):
                await self._move_experts(layer, placement)
        except RankRefused as error:
            log.warning("%s: experts stay where they are: %s", self._settings.engine, error)
        await self._look_at_experts()
        log.info("%s: expert imbalance was %.2f, is %.2f", self._settings.engine, before, self._experts.imbalance)

    async def _move_experts(self, layer: int, placement: ExpertPlacement) -> None:
        self._experts.epoch += 1
        epoch, timeout_s = self._experts.epoch, self._pace.move_timeout_s
        places = [(layer, placement.slots)]
        await self._all(lambda rank: rank.stage_experts(epoch, places), self._settings.load_timeout_s)
        await self._all(lambda rank: rank.switch_experts(epoch, timeout_s), timeout_s + self._pace.call_timeout_s)

    async def _restart(self, reason: str, starts: int) -> None:
        """A lost rank takes the others with it: what they hold is only consistent together."""
        if starts > self._pace.max_starts:
            await self._fail(f"gave up after {starts - 1} starts, the last of which ended so: {reason}")
            return
        log.warning("%s: %s; starting all ranks again", self._settings.engine, reason)
        self.error = reason
        self._advance(EngineEvent.LOST)
        await self._ranks.clear()
        if starts > 1:
            await asyncio.sleep(min(self._pace.most_backoff_s, self._pace.first_backoff_s * 2 ** (starts - 2)))
        self._advance(EngineEvent.CLEARED)

    async def _fail(self, reason: str) -> None:
        log.error("%s cannot be served: %s", self._settings.engine, reason)
        self.error = reason
        await self._ranks.clear()
        self._advance(EngineEvent.REFUSED)

    async def _all(
        self, ask: Callable[[Rank], Awaitable[T]], timeout_s: float, ranks: Sequence[Rank] | None = None
    ) -> Sequence[T]:
        """Every rank's answer, in order. The first failure counts, and silence is one."""
        tasks = [asyncio.ensure_future(ask(rank)) for rank in (self._members if ranks is None else ranks)]
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.gather(*tasks)
        except TimeoutError:
            raise RankLost(f"no answer from every rank in {timeout_s:g} s") from None
        finally:
            for task in tasks:
                task.cancel()

    def _advance(self, event: EngineEvent) -> None:
        before, self.state = self.state, after(self.state, event)
        if self.state is not before:
            log.info("%s: %s after %s", self._settings.engine, self.state, before)
        self._on_change()


def _group(engine: str, dp_group: int, generation: int, target: str) -> GroupAddress:
    host, _, port = target.rpartition(":")
    return GroupAddress(
        key=f"{engine}/{dp_group}",
        engine=engine,
        dp_group=dp_group,
        host=host.strip("[]"),
        port=int(port),
        generation=generation,
    )


def _num_hosts(hosts: Sequence[str]) -> int:
    """Hosts whose ranks are neighbours, equally many on each; 1 where they are not."""
    found = len(set(hosts))
    per_host = len(hosts) // found
    even = len(hosts) % found == 0 and all(
        len(set(hosts[start : start + per_host])) == 1 for start in range(0, len(hosts), per_host)
    )
    return found if even else 1


def _add_rank(status: admin_pb2.EngineStatus, report: RankStatus, expert_tokens: float) -> None:
    status.ranks.add(
        rank=report.rank,
        node=report.host,
        pid=report.pid,
        device=report.device,
        threads=report.threads,
        weight_bytes=report.weight_bytes,
        cache_bytes=report.cache_bytes,
        expert_tokens=expert_tokens,
    )
