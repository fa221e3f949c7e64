"""The roster as a named Ray actor. Everything it decides is in `cluster.roster`.

What operators have decided and ordered is kept for the case that this process dies: each such call is answered when
that is done, or has not worked in a while. So are the DP groups.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from cluster import logs
from cluster.app.memory import GcsMemory, Kept
from cluster.app.names import NAMESPACE, ON_HEAD, ROSTER
from cluster.app.reap import reap_engine
from cluster.orders import News, Order, Orders
from cluster.roster import Claim, EngineReport, FrontDoorReport, Roster, Snapshot

__all__ = ["LEASE_S", "RosterActor", "find_roster", "start_roster"]

log = logging.getLogger(__name__)

LEASE_S = 5.0
REAP_AFTER_S = 120.0  # longer than a head takes to come back with all that was on it
_TICK_S = 0.5
_KEEP_S = 2.0  # an operator is not to wait longer for a head that is away; it is tried again with every tick


class RosterActor:
    """One in the cluster; calls are answered on one event loop, so the bookkeeping needs no lock."""

    async def __init__(self, log_level: str) -> None:  # type: ignore[misc]  # Ray awaits it
        logs.configure(log_level)
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._memory = GcsMemory()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="memory")  # one, so that nothing overtakes
        self._keeping = asyncio.Lock()
        self._kept = await asyncio.to_thread(self._memory.load) if again else None
        kept = self._kept or Kept()
        self._roster = Roster(
            time.monotonic,
            lease_s=LEASE_S,
            reap_after_s=REAP_AFTER_S,
            settle_s=LEASE_S if again else 0.0,
            decisions=kept.decisions,
            groups=kept.groups,
        )
        self._orders = Orders(kept.orders)
        self._changed = asyncio.Condition()
        self._version = self._roster.snapshot().version
        self._ticking = asyncio.create_task(self._tick())

    async def claim(self, leader: str, engines: tuple[str, ...]) -> Claim | None:
        claim = self._roster.claim(leader, engines)
        await self._announce()
        return claim

    async def report_engine(self, report: EngineReport) -> bool:
        accepted = self._roster.report_engine(report)
        await self._announce()
        return accepted

    async def release(self, leader: str) -> None:
        self._roster.release(leader)
        await self._announce()

    async def report_front_door(self, report: FrontDoorReport) -> None:
        self._roster.report_front_door(report)

    async def remove_front_door(self, front_door: str) -> None:
        self._roster.remove_front_door(front_door)

    async def drain(self) -> None:
        self._roster.drain()
        await self._decided()

    async def watch(self, version: int, timeout_s: float) -> Snapshot:
        """The snapshot, as soon as its version is another than `version`, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._roster.snapshot().version != version)
        except TimeoutError:
            log.debug("no change in %.1f s", timeout_s)
        return self._roster.snapshot()

    async def overview(self) -> tuple[tuple[EngineReport, ...], tuple[FrontDoorReport, ...]]:
        """What everyone last said of themselves."""
        return self._roster.engines(), self._roster.front_doors()

    async def leave(self, keys: tuple[str, ...], timeout_s: float) -> None:
        self._roster.leave(keys, timeout_s)
        await self._decided()

    async def stay(self, keys: tuple[str, ...]) -> None:
        self._roster.stay(keys)
        await self._decided()

    async def weigh(self, weights: tuple[tuple[str, float], ...]) -> None:
        self._roster.weigh(weights)
        await self._decided()

    async def close_doors(self, node: str, timeout_s: float) -> None:
        self._roster.close_doors(node, timeout_s)
        await self._decided()

    async def open_doors(self, node: str) -> None:
        self._roster.open_doors(node)
        await self._decided()

    async def give_order(self, kind: Literal["drain", "scale", "rollout"], request: bytes) -> int:
        number = self._orders.give(kind, request)
        await self._keep()
        return number

    async def take_order(self) -> Order | None:
        order = self._orders.take()
        await self._keep()
        return order

    async def tell_news(self, number: int, news: News) -> None:
        self._orders.tell(number, news)
        await self._keep()

    async def news(self, number: int, after: int) -> tuple[News, ...] | None:
        return self._orders.news(number, after)

    async def whereabouts(self) -> tuple[str, int]:
        """This process: its node's address and its id."""
        return ray.util.get_node_ip_address(), os.getpid()

    async def _decided(self) -> None:
        await self._announce()
        await self._keep()

    async def _keep(self) -> None:
        """Has what nobody reports written down, where it has changed."""
        async with self._keeping:
            roster = self._roster
            kept = Kept(decisions=roster.decisions, orders=self._orders.kept(), groups=roster.groups)
            if kept == self._kept:
                return
            try:
                writing = asyncio.get_running_loop().run_in_executor(self._writer, self._memory.save, kept)
                await asyncio.wait_for(writing, _KEEP_S)
            except (RayError, TimeoutError) as error:
                log.warning("what operators decided is not kept for another roster: %s", error or "no answer")
                return
            self._kept = kept

    async def _announce(self) -> None:
        """Wakes the watchers where there is something new."""
        version = self._roster.snapshot().version
        if version != self._version:
            self._version = version
            async with self._changed:
                self._changed.notify_all()

    async def _tick(self) -> None:
        """Leases run out without anybody calling."""
        while True:
            await asyncio.sleep(_TICK_S)
            await self._decided()
            for engine in self._roster.take_abandoned():
                log.warning("%s has had no leader for %.0f s: taking it down", engine, LEASE_S + REAP_AFTER_S)
                await asyncio.to_thread(reap_engine, engine)


def start_roster(log_level: str) -> Any:
    """Starts the roster, or finds the one that is there."""
    options = {
        "name": ROSTER,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "num_cpus": 0,
        "resources": ON_HEAD,
        "max_concurrency": 1000,
    }
    return ray.remote(RosterActor).options(**options).remote(log_level)


def find_roster() -> Any:
    """The roster of the cluster this process belongs to. Raises ValueError where there is none."""
    return ray.get_actor(ROSTER, namespace=NAMESPACE)
