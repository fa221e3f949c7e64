"""Process groups of one generation.

The leader hosts the store in which ranks find each other (`host_store`), so it outlives every rank. Each generation
has its own prefix there, and its own members: whole DP groups, but not always all of the plan's. Each stage of a DP
group has a tensor group with the short step timeout, whose collectives fail soon after a peer does, and one with the
long loading timeout for agreements; the stages of a column have the same.
"""

from __future__ import annotations

import importlib
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # they come from C++
from torch.distributed.distributed_c10d import _set_pg_timeout

from workers.parallel import native, shm
from workers.parallel.collectives import (
    Collectives,
    GlooCollectives,
    ProcessGroupCollectives,
    SharedMemoryCollectives,
    SingleRank,
)
from workers.parallel.exchange import Exchange
from workers.parallel.exchange_choice import join_exchange
from workers.parallel.liveness import stuck_after_s
from workers.parallel.stages import OneStage, ProcessGroupStages, Stages
from workers.parallel.vacant import LoneExchange
from workers.report import Outdated
from workers.settings import EngineSettings

__all__ = ["Groups", "HostedStore", "host_store"]

log = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 60.0
_LOOK_S = 0.1  # how soon who waits for others learns that their generation is over


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

    def places(self, ranks: Sequence[int]) -> list[int]:
        """The numbers in the world of those of `ranks` that are here."""
        return [self.members.index(rank) for rank in ranks if rank in self.members]

    def tensor_groups(self) -> list[list[int]]:
        """Of every stage of each DP group that is here."""
        plan = self.settings.plan
        return [self.places(plan.tensor_group(rank)) for rank in self.members if rank % plan.tensor == 0]

    def columns(self) -> list[list[int]]:
        """The stages that hand on to each other, of each DP group that is here."""
        plan = self.settings.plan
        return [self.places(plan.column(rank)) for rank in self.members if plan.place(rank).stage == 0]


@dataclass(frozen=True, slots=True)
class _Own:
    """A pair of groups over the same members, by their numbers in the world."""

    members: list[int]
    step_group: Any
    slow_group: Any


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's groups in one generation."""

    generation: int
    tensor: Collectives
    stages: Stages = field(default_factory=OneStage)
    expert: Exchange | None = None  # None where experts are not spread, or no group but this one uses them
    joined: bool = False

    @property
    def kind(self) -> str:
        """What carries sums and stages, in words for `shoal status`."""
        if self.stages.size == 1:
            return self.tensor.kind
        stages = f"stages over {self.stages.kind}"
        return f"{self.tensor.kind}, {stages}" if self.tensor.size > 1 else stages

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
        is_over: Callable[[], bool] = lambda: False,
    ) -> Groups:
        """Meets the other members of the generation, whole DP groups; `hosts` has each member's, this rank's too.

        `spread_experts` says that the model's routed experts are spread over all of a stage; without that a DP group
        meets alone. Raises RuntimeError or TimeoutError naming who is missing, or Outdated once `is_over` says that
        this generation is not to come.
        """
        plan = settings.plan
        own = plan.place(rank).dp_group
        members = tuple(sorted(other for other in hosts if spread_experts or plan.place(other).dp_group == own))
        world = _World(settings, rank, members)
        if world.size == 1:
            return cls(generation, SingleRank(), expert=LoneExchange() if spread_experts else None)
        name = f"gen{generation}" if spread_experts else f"gen{generation}/group{own}"
        shared = _meet(world, name, generation, store, timeout_s, is_over)
        native.prepare_gloo(hosts[rank])
        native.prepare_nccl()
        obstacle = _obstacle(settings, tuple(hosts[member] for member in members)) or _agree(shared, world)
        if obstacle is not None and settings.collectives == "shm":
            raise ValueError(f"collectives: shm is not possible: {obstacle}")
        try:
            _initialise(world, shared, timeout_s, use_shared_memory=obstacle is None)
            tensor = SingleRank() if plan.tensor == 1 else _tensor_collectives(world, obstacle, timeout_s)
            expert = _expert_exchange(world, hosts, shared, generation, timeout_s) if spread_experts else None
            stages = OneStage() if plan.pipeline == 1 else _stages(world, timeout_s)
        except BaseException:
            _leave_world()  # or the next generation finds this one still there
            raise
        return cls(generation, tensor, stages, expert, joined=True)

    def close(self) -> None:
        """Leaves the groups, which its peers notice at once; a new generation may follow in this process."""
        if self.expert is not None:
            self.expert.close()
        if self.joined:
            _leave_world()


def _meet(
    world: _World, name: str, generation: int, store: tuple[str, int], timeout_s: float, is_over: Callable[[], bool]
) -> Any:
    """The generation's part of the store, once every member is there."""
    timeout = timedelta(seconds=timeout_s)
    client = TCPStore(store[0], store[1], is_master=False, wait_for_workers=False, timeout=timeout)
    shared = PrefixStore(name, client)
    shared.set(f"joined/{world.rank}", "1")
    keys = [f"joined/{other}" for other in world.members]
    give_up_s = time.monotonic() + timeout_s
    while (left_s := give_up_s - time.monotonic()) > 0:
        try:
            shared.wait(keys, timedelta(seconds=min(left_s, _LOOK_S)))
            return shared
        except RuntimeError:
            if is_over():
                raise Outdated(f"generation {generation} is over: rank {world.rank} waits for it no more") from None
    missing = [other for other in world.members if not shared.check([f"joined/{other}"])]
    raise TimeoutError(f"ranks {missing} did not join generation {generation} in {timeout_s:g} s")


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


def import_deepspeed() -> None:
    """Ahead of `_initialise`, for whoever chooses when these seconds are spent."""
    importlib.import_module("deepspeed.comm")


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


def _leave_world() -> None:
    """Safe to repeat, and after half of `_initialise`."""
    if not distributed.is_initialized():
        return
    from deepspeed import comm

    if comm.is_initialized():
        comm.destroy_process_group()
    else:
        distributed.destroy_process_group()


def _group(members: list[int], backend: str, joined_in_s: float, timeout_s: float) -> Any:
    """A group whose members must meet in `joined_in_s`, and whose collectives may then take `timeout_s`."""
    group = distributed.new_group(members, timedelta(seconds=joined_in_s), backend)
    if group is not distributed.GroupMember.NON_GROUP_MEMBER:
        _set_pg_timeout(timedelta(seconds=timeout_s), group)
    return group


def _backend(world: _World) -> str:
    return "nccl" if world.settings.device == "cuda" else "gloo"


def _own(world: _World, all_members: Sequence[list[int]], joined_in_s: float, timeout_s: float) -> _Own:
    """A group for steps and one for agreements, of those members among which this rank is."""
    own: _Own | None = None
    for members in all_members:
        # Every rank makes every group, in one order: torch demands it.
        step = _group(members, _backend(world), joined_in_s, timeout_s)
        slow = _group(members, "gloo", joined_in_s, world.settings.load_timeout_s)
        if world.index in members:
            own = _Own(members, step, slow)
    assert own is not None
    return own


def _expert_exchange(
    world: _World, hosts: Mapping[int, str], shared: Any, generation: int, joined_in_s: float
) -> Exchange:
    """All members of the stage. A peer that works is waited for as long as it takes; one that hangs shows by the
    common beat."""
    settings, plan = world.settings, world.settings.plan
    stuck_s = stuck_after_s(settings.step_timeout_s)
    own_stage = plan.place(world.rank).stage
    groups = [
        _group(world.places(plan.stage_ranks(stage)), _backend(world), joined_in_s, stuck_s)
        for stage in range(plan.pipeline)
    ]
    members = tuple(rank for rank in plan.stage_ranks(own_stage) if rank in world.members)
    if len(members) == 1:
        return LoneExchange()
    return join_exchange(
        settings,
        world.rank,
        members,
        hosts,
        PrefixStore(f"stage{own_stage}", shared),
        group=groups[own_stage],
        generation=generation,
        join_timeout_s=joined_in_s,
        step_timeout_s=stuck_s,
    )


def _stages(world: _World, joined_in_s: float) -> Stages:
    """A stage that works is waited for as long as it takes; that one hangs, the first rank sees by its results."""
    stuck_s = stuck_after_s(world.settings.step_timeout_s)
    own = _own(world, world.columns(), joined_in_s, stuck_s)
    backend = _backend(world)
    return ProcessGroupStages(
        index=world.settings.plan.place(world.rank).stage,
        ranks=own.members,
        step_group=own.step_group,
        slow_group=own.slow_group,
        timeout=timedelta(seconds=stuck_s) if backend == "gloo" else None,
        kind=backend,
    )


def _tensor_collectives(world: _World, obstacle: str | None, joined_in_s: float) -> Collectives:
    settings, plan = world.settings, world.settings.plan
    own = _own(world, world.tensor_groups(), joined_in_s, settings.step_timeout_s)
    backend = _backend(world)
    of_backend = GlooCollectives if backend == "gloo" else ProcessGroupCollectives
    make = of_backend if obstacle is not None else SharedMemoryCollectives
    kind = _kind(settings, backend, obstacle)
    collectives = make(
        index=plan.place(world.rank).tensor_index,
        size=plan.tensor,
        first_rank=own.members[0],
        step_group=own.step_group,
        slow_group=own.slow_group,
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
