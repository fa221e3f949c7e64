"""Faults one after the other while a load runs: each is waited for until the cluster is whole again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc

from cluster.chaos.load import Load, Work, reference
from cluster.chaos.schedule import Fault, Plan, draw
from cluster.chaos.verdict import Hit, Verdict, verdict
from cluster.client.held import CHANNEL_OPTIONS
from protos.shoal.v1 import admin_pb2, admin_pb2_grpc

__all__ = ["Campaign", "ChaosError", "run", "works"]

_CALL_S = 10.0
_LOOK_S = 0.2
_SETTLE_S = 3.0  # of load alone, before the first fault and behind the last
_TRIES = 30


class ChaosError(Exception):
    """The campaign cannot go on; the message is for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """`gap_s` is between a cluster that is whole again and the next fault: drawn evenly from this range."""

    address: str
    api_key: str
    plan: Plan
    num_faults: int
    seed: int = 0
    num_streams: int = 8
    works: Sequence[Work] = ()
    gap_s: tuple[float, float] = (0.5, 3.0)
    heal_timeout_s: float = 120.0
    verify: bool = True

    @property
    def metadata(self) -> Sequence[tuple[str, str]]:
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def connect(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)


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


async def run(campaign: Campaign, tell: Callable[[str], None]) -> Verdict:
    """Raises ChaosError."""
    status = await _status(campaign)
    expected = None
    if campaign.verify:
        tell(f"asking {len(campaign.works)} requests undisturbed")
        try:
            expected = await reference(campaign.connect, campaign.works, campaign.metadata)
        except RuntimeError as error:
            raise ChaosError(str(error)) from None
    load = Load(campaign.connect, campaign.works, num_streams=campaign.num_streams, metadata=campaign.metadata)
    began_s = time.monotonic()
    running = asyncio.create_task(load.run())
    hits: list[Hit] = []
    try:
        await asyncio.sleep(_SETTLE_S)
        await _faults(campaign, status, hits, tell)
        await asyncio.sleep(_SETTLE_S)
    finally:
        ended_s = time.monotonic()
        load.stop()
        tell("finishing the open streams")
        await running
    return verdict(load.records, hits, seed=campaign.seed, began_s=began_s, ended_s=ended_s, expected=expected)


async def _faults(
    campaign: Campaign, before: admin_pb2.StatusResponse, hits: list[Hit], tell: Callable[[str], None]
) -> None:
    rng = random.Random(campaign.seed)  # noqa: S311 - repeatable, keeps no secret
    for number in range(1, campaign.num_faults + 1):
        status = await _status(campaign)
        try:
            fault = draw(campaign.plan, rng, targets(status))
        except ValueError as error:
            raise ChaosError(str(error)) from None
        at_s = time.monotonic()
        pids, trouble = await _inject(campaign, fault)
        healed_s = await _healed(campaign, before, fault, at_s, pids)
        hits.append(Hit(fault, at_s, healed_s, trouble))
        what = f"{fault.kind} {', '.join(fault.targets)}"
        if healed_s is None:
            limit = f"{campaign.heal_timeout_s:g} s"
            raise ChaosError(f"the cluster is not whole {limit} after {what}" + f"; {trouble}" * bool(trouble))
        tell(f"{number} of {campaign.num_faults}: {what}: whole again after {healed_s - at_s:.1f} s {trouble}")
        await asyncio.sleep(rng.uniform(*campaign.gap_s))


def targets(status: admin_pb2.StatusResponse) -> Mapping[str, Sequence[str]]:
    """Who is there, by role."""
    return {
        "rank": [f"{engine.name}/rank-{rank.rank}" for engine in status.engines for rank in engine.ranks],
        "leader": [f"{engine.name}/leader" for engine in status.engines],
        "engine": [engine.name for engine in status.engines],
        "front-door": [f"front-door/{door.id}" for door in status.front_doors],
        "controller": ["controller"],
        "roster": ["roster"],
    }


def whole(now: admin_pb2.StatusResponse, before: admin_pb2.StatusResponse, gone: frozenset[int]) -> bool:
    """Whether everything is there that was, ready, and nothing of what was killed is still counted."""
    engines_ready = [engine.state == "ready" for engine in now.engines]
    doors = [len(door.dp_groups) for door in now.front_doors]
    groups = sum(len(engine.dp_groups) for engine in now.engines)
    pids = {rank.pid for engine in now.engines for rank in engine.ranks}
    pids |= {engine.leader_pid for engine in now.engines} | {door.pid for door in now.front_doors}
    return (
        all(engines_ready)
        and len(engines_ready) == len(before.engines)
        and len(doors) == len(before.front_doors)
        and all(count == groups for count in doors)
        and not pids & gone
    )


async def _healed(
    campaign: Campaign, before: admin_pb2.StatusResponse, fault: Fault, at_s: float, pids: frozenset[int]
) -> float | None:
    """When the cluster was whole again; None where it took too long."""
    gone = pids if fault.kind == "kill" and fault.role in ("rank", "leader", "front-door", "engine") else frozenset()
    while time.monotonic() < at_s + campaign.heal_timeout_s:
        await asyncio.sleep(_LOOK_S)
        try:
            status = await _status(campaign, tries=1)
        except ChaosError:
            continue
        now_s = time.monotonic()
        if whole(status, before, gone) and now_s >= at_s + fault.duration_s:
            return now_s
    return None


async def _inject(campaign: Campaign, fault: Fault) -> tuple[frozenset[int], str]:
    """Hits all targets; the processes, and what went wrong."""
    requests = [
        admin_pb2.InjectRequest(fault=fault.kind, target=target, duration_s=fault.duration_s, share=fault.share)
        for target in fault.targets
    ]
    async with campaign.connect() as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        calls = [stub.Inject(request, metadata=campaign.metadata, timeout=_CALL_S) for request in requests]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    pids = frozenset(pid for answer in answers if isinstance(answer, admin_pb2.InjectResponse) for pid in answer.pids)
    for answer in answers:
        if isinstance(answer, grpc.aio.AioRpcError):
            denied = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
            if answer.code() in (*denied, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED):
                raise ChaosError(str(answer.details()))
            return pids, f"{fault.kind} {fault.targets}: {answer.code().name}: {answer.details()}"
        if isinstance(answer, BaseException):
            raise answer
    return pids, ""


async def _status(campaign: Campaign, *, tries: int = _TRIES) -> admin_pb2.StatusResponse:
    """From any front door that answers."""
    failure = ""
    for _ in range(tries):
        async with campaign.connect() as channel:
            try:
                return await admin_pb2_grpc.AdminStub(channel).Status(
                    admin_pb2.StatusRequest(), metadata=campaign.metadata, timeout=_CALL_S
                )
            except grpc.aio.AioRpcError as error:
                failure = f"{campaign.address}: {error.details()}"
        await asyncio.sleep(_LOOK_S)
    raise ChaosError(failure)
