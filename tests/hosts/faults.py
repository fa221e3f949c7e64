"""Whole hosts as targets of a chaos campaign: killed, frozen, cut off; after a while they are back, in Ray too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.chaos.injector import Harm, processes_there
from cluster.chaos.schedule import Fault
from protos.shoal.v1 import admin_pb2
from tests.hosts.harness import Hosts
from tests.hosts.host import Host
from tests.hosts.ray_cluster import rejoin
from tests.priority import as_others

__all__ = ["HOST_FAULTS", "HostFaults"]

HOST_FAULTS = ("kill", "freeze", "cut", "mute", "part")
"""`cut`: nothing comes or goes. `mute`: what it sends to other hosts is lost. `part`: it and one other that may fall
do not reach each other, everybody else reaches both."""

_VERDICT_S = 15  # by then Ray has ended on a host that its head had given up, though that is back

T = TypeVar("T")


class HostFaults:
    """`falling` are the hosts that may be hit, one at a time; `head` has Ray's head. An async context manager: what it
    boots ends with it."""

    def __init__(self, hosts: Hosts, falling: Sequence[Host], head: Host, *, num_cpus: int) -> None:
        self._hosts = hosts
        self._falling = {host.name: host for host in falling}
        self._head = head
        self._num_cpus = num_cpus
        self._down = ""
        self._watching: asyncio.Task[None] | None = None
        # Hosts end with the thread that boots them, and what they are told takes seconds.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hosts", initializer=as_others)

    def targets(self, status: admin_pb2.StatusResponse) -> Mapping[str, Sequence[str]]:
        """Nobody while one is down."""
        del status
        return {"host": [] if self._down else list(self._falling)}

    async def inject(self, fault: Fault, status: admin_pb2.StatusResponse) -> Harm:
        (name,) = fault.targets
        host, self._down = self._falling[name], name
        gone = frozenset(process for process in processes_there(status) if process[0] == host.address)
        await self._do(lambda: self._hit(fault.kind, host))
        return Harm(gone=gone if fault.kind == "kill" else frozenset(), end=lambda: self._end(host))

    def close(self) -> None:
        self._thread.shutdown()

    def _hit(self, kind: str, host: Host) -> None:
        if kind == "kill":
            self._hosts.kill(host)
        elif kind == "freeze":
            self._hosts.freeze(host)
        elif kind == "cut":
            self._hosts.cut(host)
        elif kind == "mute":
            for other in self._hosts:
                if other is not host:
                    self._hosts.cut_one_way(host, other)
        else:
            other = next(one for one in self._falling.values() if one is not host)
            self._hosts.cut(host, other)

    async def _end(self, host: Host) -> None:
        await self._do(lambda: self._return(host))
        self._down = ""
        self._watching = asyncio.create_task(self._supervise(host))

    async def _supervise(self, host: Host) -> None:
        """Where the head finds the host dead as it comes back, Ray ends there a moment later."""
        for _ in range(_VERDICT_S):
            await asyncio.sleep(1.0)
            if self._down == host.name or not host.alive:
                return
            await self._do(lambda: rejoin(host, self._head, num_cpus=self._num_cpus))

    def _return(self, host: Host) -> None:
        if not host.alive:
            self._hosts.boot(host)
        self._hosts.heal(host)
        rejoin(host, self._head, num_cpus=self._num_cpus)

    async def _do(self, act: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)
