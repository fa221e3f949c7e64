"""Who does harm: the cluster itself to its processes, and whoever has hosts in his hands to those."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from cluster.chaos.doors import FATAL, ChaosError, Doors
from cluster.chaos.schedule import NODE, Fault
from protos.shoal.v1 import admin_pb2, admin_pb2_grpc

__all__ = ["AdminInjector", "Harm", "Injector", "Injectors", "Process", "processes_there"]

_CALL_S = 10.0

Process = tuple[str, int]
"""A node's address, and a pid there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Harm:
    """What was done: the processes that will not come back, what went wrong, and what ends it (after the fault's
    `duration_s`) where it does not end by itself."""

    gone: frozenset[Process] = frozenset()
    trouble: str = ""
    end: Callable[[], Awaitable[None]] | None = None


class Injector(Protocol):
    """Some roles, and how they are hit."""

    def targets(self, status: admin_pb2.StatusResponse) -> Mapping[str, Sequence[str]]:
        """Who is there now, by role."""
        ...

    async def inject(self, fault: Fault, status: admin_pb2.StatusResponse) -> Harm:
        """Hits all targets. Raises ChaosError where it never can."""
        ...


class Injectors:
    """Several as one; each has roles of its own."""

    def __init__(self, *injectors: Injector) -> None:
        self._injectors = injectors

    def targets(self, status: admin_pb2.StatusResponse) -> Mapping[str, Sequence[str]]:
        return {role: names for one in self._injectors for role, names in one.targets(status).items()}

    async def inject(self, fault: Fault, status: admin_pb2.StatusResponse) -> Harm:
        for one in self._injectors:
            if fault.role in one.targets(status):
                return await one.inject(fault, status)
        raise ChaosError(f"nobody can {fault.kind} a {fault.role}")


class AdminInjector:
    """Processes, by order to a front door (`Admin.Inject`)."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    def targets(self, status: admin_pb2.StatusResponse) -> Mapping[str, Sequence[str]]:
        return {
            "rank": [f"{engine.name}/rank-{rank.rank}" for engine in status.engines for rank in engine.ranks],
            "leader": [f"{engine.name}/leader" for engine in status.engines],
            "engine": [engine.name for engine in status.engines],
            "front-door": [f"front-door/{door.id}" for door in status.front_doors],
            "controller": ["controller"],
            "roster": ["roster"],
            "node": [NODE + address for address in _spare_nodes(status)],
        }

    async def inject(self, fault: Fault, status: admin_pb2.StatusResponse) -> Harm:
        """Over a connection to a front door that answers: the one that is hit may be the one that is asked."""
        requests = [
            admin_pb2.InjectRequest(fault=fault.kind, target=target, duration_s=fault.duration_s, share=fault.share)
            for target in fault.targets
        ]
        harm = Harm()
        for _ in self._doors.addresses:
            harm = await self._once(fault, requests)
            if harm.gone or not harm.trouble.startswith(grpc.StatusCode.UNAVAILABLE.name):
                break
        return harm

    async def _once(self, fault: Fault, requests: Sequence[admin_pb2.InjectRequest]) -> Harm:
        async with self._doors.connect() as channel:
            stub = admin_pb2_grpc.AdminStub(channel)
            calls = [stub.Inject(request, metadata=self._doors.metadata, timeout=_CALL_S) for request in requests]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        gone = {(one.node, pid) for one in answers if isinstance(one, admin_pb2.InjectResponse) for pid in one.pids}
        trouble = ""
        for answer in answers:
            if isinstance(answer, grpc.aio.AioRpcError):
                if answer.code() in FATAL:
                    raise ChaosError(str(answer.details()))
                trouble = f"{answer.code().name}: {answer.details()}"
            elif isinstance(answer, BaseException):
                raise answer
        dead = fault.kind == "kill" and fault.role in ("rank", "leader", "front-door", "engine", "node")
        return Harm(gone=frozenset(gone) if dead else frozenset(), trouble=trouble)


def _spare_nodes(status: admin_pb2.StatusResponse) -> Sequence[str]:
    """Nodes without which every engine still has its leader and a whole DP group, and clients a front door."""
    doors = {door.node for door in status.front_doors}
    leaders = {engine.leader_node for engine in status.engines}
    groups: dict[tuple[str, int], set[str]] = {}
    for engine in status.engines:
        for rank in engine.ranks:
            groups.setdefault((engine.name, rank.dp_group), set()).add(rank.node)
    engines = {name for name, _ in groups}
    return [
        node
        for node in sorted(doors.union(*groups.values()) - leaders)
        if doors - {node} and engines == {name for (name, _), nodes in groups.items() if node not in nodes}
    ]


def processes_there(status: admin_pb2.StatusResponse) -> frozenset[Process]:
    """Every process that reports itself."""
    ranks = {(rank.node, rank.pid) for engine in status.engines for rank in engine.ranks}
    leaders = {(engine.leader_node, engine.leader_pid) for engine in status.engines}
    return frozenset(ranks | leaders | {(door.node, door.pid) for door in status.front_doors})
