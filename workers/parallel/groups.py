"""Process groups of one generation.

The leader hosts the store in which ranks find each other (`host_store`), so it outlives every rank. Each generation
has its own prefix there, and its own members: whole DP groups, but not always all of the plan's. Each DP group has a
tensor group with the short step timeout, whose collectives fail soon after a peer does, and one with the long loading
timeout for agreements.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # they come from C++
from torch.distributed.distributed_c10d import _set_pg_timeout

from workers.parallel import native, shm
from workers.parallel.collectives import Collectives, ProcessGroupCollectives, SharedMemoryCollectives, SingleRank
from workers.parallel.exchange import Exchange
from workers.parallel.exchange_choice import join_exchange
from workers.parallel.liveness import stuck_after_s
from workers.parallel.vacant import LoneExchange
from workers.settings import EngineSettings

__all__ = ["Groups", "HostedStore", "host_store"]

log = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 60.0


class HostedStore:
    """The store of an engine; it lives as long as this object."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        self.host = host
        self.port: int = listener.getsockname()[1]
        # The store takes the listening socket over, so it is bound to this address alone.
        self._store = TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def host_store(host: str) -> HostedStore:
    """Starts a store on a free port of `host`, for the leader to keep."""
    return HostedStore(host)


@dataclass(frozen=True, slots=True)
class _World:
    """Who meets: `members` are ranks of the engine, ascending; a rank's number in torch's world is its place there."""

    settings: EngineSettings
    rank: int
    members: tuple[int, ...]

    @property
    def index(self) -> int:
        return self.members.index(self.rank)

    @property
    def size(self) -> int:
        return len(self.members)

    def groups(self) -> list[list[int]]:
        """The members of each DP group that is here, by their numbers in the world."""
        size = self.settings.plan.group_size
        found: dict[int, list[int]] = {}
        for index, rank in enumerate(self.members):
            found.setdefault(rank // size, []).append(index)
        return [found[group] for group in sorted(found)]


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's groups in one generation."""

    generation: int
    tensor: Collectives
    expert: Exchange | None = None  # None where experts are not spread, or no group but this one uses them
    joined: bool = False

    @classmethod
    def join(
        cls,
        settings: EngineSettings,
        rank: int,
        *,
        generation: int,
        store: tuple[str, int],
        hosts: Mapping[int, str],
        spread_experts: bool = False,
        timeout_s: float = _JOIN_TIMEOUT_S,
    ) -> Groups:
        """Meets the other members of the generation, whole DP groups; `hosts` has each member's, this rank's too.

        `spread_experts` says that the model's routed experts are spread over all of them; without that a DP group
        meets alone. Raises RuntimeError or TimeoutError naming who is missing.
        """
        plan = settings.plan
        if plan.pipeline != 1:
            raise ValueError(f"parallel.pipeline must be 1, not {plan.pipeline}")
        own = plan.place(rank).dp_group
        members = tuple(sorted(other for other in hosts if spread_experts or plan.place(other).dp_group == own))
        world = _World(settings, rank, members)
        if world.size == 1:
            return cls(generation, SingleRank(), LoneExchange() if spread_experts else None)
        name = f"gen{generation}" if spread_experts else f"gen{generation}/group{own}"
        shared = _meet(world, name, generation, store, timeout_s)
        native.prepare_gloo(hosts[rank])
        native.prepare_nccl()
        obstacle = _obstacle(settings, tuple(hosts[member] for member in members)) or _agree(shared, world)
        if obstacle is not None and settings.collectives == "shm":
            raise ValueError(f"collectives: shm is not possible: {obstacle}")
        _initialise(world, shared, timeout_s, use_shared_memory=obstacle is None)
        tensor = SingleRank() if plan.tensor == 1 else _tensor_collectives(world, obstacle, timeout_s)
        expert = _expert_exchange(world, hosts, shared, generation, timeout_s) if spread_experts else None
        return cls(generation, tensor, expert, joined=True)

    def close(self) -> None:
        """Leaves the groups, which its peers notice at once; a new generation may follow in this process."""
        if self.expert is not None:
            self.expert.close()
        if self.joined and distributed.is_initialized():
            from deepspeed import comm

            comm.destroy_process_group()


def _meet(world: _World, name: str, generation: int, store: tuple[str, int], timeout_s: float) -> Any:
    """The generation's part of the store, once every member is there."""
    timeout = timedelta(seconds=timeout_s)
    client = TCPStore(store[0], store[1], is_master=False, wait_for_workers=False, timeout=timeout)
    shared = PrefixStore(name, client)
    shared.set(f"joined/{world.rank}", "1")
    try:
        shared.wait([f"joined/{other}" for other in world.members], timeout)
    except RuntimeError as error:
        missing = [other for other in world.members if not shared.check([f"joined/{other}"])]
        raise TimeoutError(f"ranks {missing} did not join generation {generation} in {timeout_s:g} s") from error
    return shared


def _obstacle(settings: EngineSettings, hosts: tuple[str, ...]) -> str | None:
    """What in the settings keeps shared memory from being used; `hosts` are the members' own."""
    if settings.device != "cpu" or settings.collectives in ("gloo", "nccl"):
        return "as configured"
    if len(hosts) != settings.plan.tensor:
        return "shared memory serves one tensor group alone"
    return "ranks on several hosts" if len(set(hosts)) > 1 else None


def _agree(shared: Any, world: _World) -> str | None:
    """The ranks' first obstacle to shared memory, the same answer at every rank.

    The first one leaves a mark in its shared memory: equal addresses do not prove that ranks see the same one.
    """
    settings = world.settings
    ours = shm.obstacle(world.size, settings.dtype)
    if ours is None and settings.collectives == "auto":
        ours = shm.crowding(settings.plan.num_ranks * settings.num_threads)
    if world.index == 0:
        name = secrets.token_hex(8)
        if ours is None:
            shm.mark(name).touch()
        shared.set("shm/name", name)
    name = shared.get("shm/name").decode()
    if ours is None and not shm.mark(name).exists():
        ours = "ranks with different shared memories"
    shared.set(f"shm/{world.index}", ours or "")
    reasons = [shared.get(f"shm/{other}").decode() for other in range(world.size)]
    if world.index == 0:
        shm.mark(name).unlink(missing_ok=True)
    reason = next((reason for reason in reasons if reason), None)
    if reason is None:
        native.prepare_shared_memory(world.size, name)
    return reason


def _initialise(world: _World, shared: Any, timeout_s: float, *, use_shared_memory: bool) -> None:
    """Makes torch's world, and has DeepSpeed wrap it."""
    distributed.init_process_group(
        "gloo", store=shared, rank=world.index, world_size=world.size, timeout=timedelta(seconds=timeout_s)
    )
    from deepspeed import comm  # takes a while to import; a world of one rank does without

    if not comm.is_initialized():
        if use_shared_memory:
            shm.offer_op()
        else:
            shm.forbid_op()
        comm.init_distributed(verbose=False)
    if use_shared_memory:
        comm.barrier()
        shm.unlink(world.index)


def _group(members: list[int], backend: str, joined_in_s: float, timeout_s: float) -> Any:
    """A group whose members must meet in `joined_in_s`, and whose collectives may then take `timeout_s`."""
    group = distributed.new_group(members, timedelta(seconds=joined_in_s), backend)
    if group is not distributed.GroupMember.NON_GROUP_MEMBER:
        _set_pg_timeout(timedelta(seconds=timeout_s), group)
    return group


def _expert_exchange(
    world: _World, hosts: Mapping[int, str], shared: Any, generation: int, joined_in_s: float
) -> Exchange:
    """All members. A peer that works is waited for as long as it takes; one that hangs shows by the common beat."""
    settings = world.settings
    backend = "nccl" if settings.device == "cuda" else "gloo"
    stuck_s = stuck_after_s(settings.step_timeout_s)
    return join_exchange(
        settings,
        world.rank,
        world.members,
        hosts,
        shared,
        group=_group(list(range(world.size)), backend, joined_in_s, stuck_s),
        generation=generation,
        join_timeout_s=joined_in_s,
        step_timeout_s=stuck_s,
    )


def _tensor_collectives(world: _World, obstacle: str | None, joined_in_s: float) -> Collectives:
    settings = world.settings
    plan = settings.plan
    backend = "nccl" if settings.device == "cuda" else "gloo"
    ours = step_group = slow_group = None
    for members in world.groups():
        # Every rank makes every group, in one order: torch demands it.
        step = _group(members, backend, joined_in_s, settings.step_timeout_s)
        slow = _group(members, "gloo", joined_in_s, settings.load_timeout_s)
        if world.index in members:
            ours, step_group, slow_group = members, step, slow
    assert ours is not None
    make = ProcessGroupCollectives if obstacle is not None else SharedMemoryCollectives
    kind = _kind(settings, backend, obstacle)
    collectives = make(
        index=plan.place(world.rank).tensor_index,
        size=plan.tensor,
        first_rank=ours[0],
        step_group=step_group,
        slow_group=slow_group,
        kind=kind,
    )
    device = torch.device(settings.device)
    _check_sum(collectives, getattr(torch, settings.dtype), device)
    (log.warning if kind.startswith("gloo (") else log.info)("rank %d: collectives over %s", world.rank, kind)
    return collectives


def _kind(settings: EngineSettings, backend: str, obstacle: str | None) -> str:
    if obstacle is None:
        return "deepspeed shared memory"
    # A fallback says why it is in force.
    return backend if settings.collectives == backend or backend == "nccl" else f"{backend} ({obstacle})"


def _check_sum(collectives: Collectives, dtype: torch.dtype, device: torch.device) -> None:
    """Raises RuntimeError unless the ranks' values are added up."""
    expected = float(collectives.size * (collectives.size + 1) // 2)
    for count in (5, 1000):
        found = collectives.all_reduce(torch.full((count,), float(collectives.index + 1), dtype=dtype, device=device))
        if not bool((found == expected).all()):
            raise RuntimeError(f"all-reduce over {collectives.kind} gives wrong sums")
