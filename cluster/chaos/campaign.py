"""Faults while a load runs: each is waited for until the cluster is whole again, but for those that are to overlap."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from cluster.chaos.doors import ChaosError, Doors
from cluster.chaos.injector import AdminInjector, Harm, Injector, Process, processes_there
from cluster.chaos.load import Load, Work, reference
from cluster.chaos.schedule import HOSTS, Fault, Plan, draw
from cluster.chaos.verdict import Hit, Verdict, verdict
from protos.shoal.v1 import admin_pb2

__all__ = ["Campaign", "ChaosError", "run", "spared", "whole", "works"]

_LOOK_S = 0.25
_SETTLE_S = 5.0  # of load alone, before the first fault and behind the last
_OVERLAP_GAP_S = (0.3, 4.0)
_LEAST_GROUPS = 2  # that live behind a fault which comes while the cluster is not whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """`addresses` are the front doors'. `gap_s` is between a cluster that is whole again and the next fault: drawn
    evenly from this range. `limits_s` are goals for the 99th percentile of pauses, by the label of a fault."""

    addresses: Sequence[str]
    api_key: str
    plan: Plan
    num_faults: int
    seed: int = 0
    num_streams: int = 8
    works: Sequence[Work] = ()
    gap_s: tuple[float, float] = (0.5, 3.0)
    heal_timeout_s: float = 120.0
    verify: bool = True
    limits_s: Mapping[str, float] = field(default_factory=dict)
    credentials: grpc.ChannelCredentials | None = None  # for TLS


def works(count: int, num_tokens: int, seed: int) -> tuple[Work, ...]:
    """Requests that differ in prompt, length and seed."""
    rng = random.Random(seed)  # noqa: S311 - repeatable, keeps no secret
    words = ("shoal", "current", "reef", "tide", "drift", "silver", "turn", "close", "deep", "school")
    return tuple(
        Work(
            prompt=" ".join(rng.choices(words, k=rng.randint(3, 24))),
            seed=rng.getrandbits(31),
            num_tokens=rng.randint(max(1, num_tokens // 2), num_tokens),
        )
        for _ in range(count)
    )


async def run(
    campaign: Campaign, tell: Callable[[str], None], *, injector: Callable[[Doors], Injector] = AdminInjector
) -> Verdict:
    """Raises ChaosError."""
    doors = Doors(campaign.addresses, campaign.api_key, campaign.credentials)
    before = await doors.status()
    expected = None
    if campaign.verify:
        tell(f"asking {len(campaign.works)} requests undisturbed")
        try:
            expected = await reference(doors.turns(), campaign.works, doors.metadata)
        except RuntimeError as error:
            raise ChaosError(str(error)) from None
    load = Load(doors.turns, campaign.works, num_streams=campaign.num_streams, metadata=doors.metadata)
    began_s = time.monotonic()
    running = asyncio.create_task(load.run())
    faults = _Faults(campaign, doors, injector(doors), before, tell)
    stopped = ""
    try:
        await asyncio.sleep(_SETTLE_S)
        await faults.run()
        await asyncio.sleep(_SETTLE_S)
    except ChaosError as error:
        if not faults.hits:
            raise
        stopped = str(error)  # what was seen until then is still worth telling
    finally:
        ended_s = time.monotonic()
        load.stop()
        tell("finishing the open streams")
        await running
    return verdict(
        load.records,
        faults.hits,
        seed=campaign.seed,
        began_s=began_s,
        ended_s=ended_s,
        expected=expected,
        limits_s=campaign.limits_s,
        stopped=stopped,
    )


class _Faults:
    """One after the other; those that are to overlap come while the cluster still closes up or fills up again."""

    def __init__(
        self,
        campaign: Campaign,
        doors: Doors,
        injector: Injector,
        before: admin_pb2.StatusResponse,
        tell: Callable[[str], None],
    ) -> None:
        self._campaign = campaign
        self._doors = doors
        self._injector = injector
        self._before = before
        self._tell = tell
        self._rng = random.Random(campaign.seed)  # noqa: S311 - repeatable, keeps no secret
        self._healing: dict[asyncio.Task[None], frozenset[Process]] = {}
        self.hits: list[Hit] = []

    async def run(self) -> None:
        try:
            for _ in range(self._campaign.num_faults):
                await self._next()
            await self._all_healed()
        finally:
            for task in self._healing:
                task.cancel()
            await asyncio.gather(*self._healing, return_exceptions=True)

    async def _next(self) -> None:
        status = await self._doors.status()
        fault = self._draw(status)
        if fault is None:
            await self._all_healed()
            status = await self._doors.status()
            fault = self._draw(status)
        if fault is None:
            raise ChaosError("none of those that the plan names is there to be hit")
        hit = Hit(fault, time.monotonic(), overlaps=bool(self._healing))
        harm = await self._injector.inject(fault, status)
        hit.error = harm.trouble
        self.hits.append(hit)
        task = asyncio.create_task(self._heal(hit, harm, len(self.hits)))
        self._healing[task] = harm.gone
        if fault.role not in HOSTS and self._rng.random() < self._campaign.plan.overlap:
            await asyncio.sleep(self._rng.uniform(*_OVERLAP_GAP_S))
            await self._raise_failed()
        else:
            await self._all_healed()
            await asyncio.sleep(self._rng.uniform(*self._campaign.gap_s))

    def _draw(self, status: admin_pb2.StatusResponse) -> Fault | None:
        """None where nobody is there, or nobody may be hit now."""
        targets = self._injector.targets(status)
        if self._healing:
            targets = spared(targets, status, frozenset[Process]().union(*self._healing.values()))
        try:
            return draw(self._campaign.plan, self._rng, targets)
        except ValueError:
            return None

    async def _all_healed(self) -> None:
        while self._healing:
            await asyncio.wait(self._healing, return_when=asyncio.FIRST_COMPLETED)
            await self._raise_failed()

    async def _raise_failed(self) -> None:
        for task in [task for task in self._healing if task.done()]:
            del self._healing[task]
            await task

    async def _heal(self, hit: Hit, harm: Harm, number: int) -> None:
        """Ends what does not end by itself, then waits. Raises ChaosError where it takes too long."""
        fault, limit_s = hit.fault, self._campaign.heal_timeout_s
        what = f"{fault.kind} {', '.join(fault.targets)}"
        await asyncio.sleep(fault.duration_s)
        if harm.end is not None:
            await harm.end()
        give_up_s = time.monotonic() + limit_s
        while hit.healed_s is None:
            if time.monotonic() > give_up_s:
                raise ChaosError(
                    f"the cluster is not whole {limit_s:g} s after {what}" + f"; {hit.error}" * bool(hit.error)
                )
            await asyncio.sleep(_LOOK_S)
            try:
                status = await self._doors.status(tries=1)
            except ChaosError:
                continue
            if whole(status, self._before, harm.gone):
                hit.healed_s = time.monotonic()
        took_s = hit.healed_s - hit.at_s
        self._tell(f"{number} of {self._campaign.num_faults}: {what}: whole again after {took_s:.1f} s {hit.error}")


def spared(
    targets: Mapping[str, Sequence[str]], status: admin_pb2.StatusResponse, gone: frozenset[Process]
) -> dict[str, Sequence[str]]:
    """Those of the targets that may be hit while others are down: somebody must live to go on."""
    living = {engine.name: sum((rank.node, rank.pid) not in gone for rank in engine.ranks) for engine in status.engines}
    found = {role: names for role, names in targets.items() if role not in (*HOSTS, "engine")}
    ranks = [name for name in found.get("rank", ()) if living[name.partition("/")[0]] > _LEAST_GROUPS]
    doors = found.get("front-door", ()) if len(found.get("front-door", ())) > 1 else ()
    # One at a time: two ranks at once may be all but one.
    return {**found, "rank": ranks[:2], "front-door": doors}


def whole(now: admin_pb2.StatusResponse, before: admin_pb2.StatusResponse, gone: frozenset[Process]) -> bool:
    """Whether everything is there that was, ready, and nothing of what was killed is still counted."""
    groups = {engine.name: len(engine.dp_groups) for engine in now.engines}
    doors = [len(door.dp_groups) for door in now.front_doors]
    return (
        all(engine.state == "ready" for engine in now.engines)
        and groups == {engine.name: len(engine.dp_groups) for engine in before.engines}
        and len(doors) == len(before.front_doors)
        and all(count == sum(groups.values()) for count in doors)
        and not processes_there(now) & gone
    )
