"""Process groups of one generation.

The leader hosts the store in which ranks find each other (`host_store`), so it outlives every rank. Each generation
has its own prefix there. A world of all ranks with the long loading timeout carries agreements; each DP group has a
tensor group with the short step timeout, whose collectives fail soon after a peer does.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # they come from C++

from workers.parallel import native, shm
from workers.parallel.collectives import Collectives, ProcessGroupCollectives, SharedMemoryCollectives, SingleRank
from workers.parallel.exchange import Exchange
from workers.parallel.exchange_choice import join_exchange
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
        hosts: tuple[str, ...],
        spread_experts: bool = False,
        timeout_s: float = _JOIN_TIMEOUT_S,
    ) -> Groups:
        """Meets the other ranks; `hosts` has each rank's. Raises RuntimeError or TimeoutError naming who is missing.

        `spread_experts` says that the model's routed experts are spread over all ranks.
        """
        plan = settings.plan
        if plan.pipeline != 1:
            raise ValueError(f"parallel.pipeline must be 1, not {plan.pipeline}")
        if plan.num_ranks == 1:
            return cls(generation, SingleRank())
        shared = _meet(rank, plan.num_ranks, generation, store, timeout_s)
        if plan.tensor == 1 and not spread_experts:
            return cls(generation, SingleRank())
        native.prepare_gloo(hosts[rank])
        native.prepare_nccl()
        obstacle = _obstacle(settings, hosts) or _agree(shared, rank, settings)
        if obstacle is not None and settings.collectives == "shm":
            raise ValueError(f"collectives: shm is not possible: {obstacle}")
        _initialise(settings, rank, shared, use_shared_memory=obstacle is None)
        tensor = SingleRank() if plan.tensor == 1 else _tensor_collectives(settings, rank, obstacle)
        expert = None
        if spread_experts:
            members = range(plan.num_ranks)
            expert = join_exchange(
                settings,
                rank,
                members,
                hosts,
                shared,
                group=_expert_group(settings, members),
                generation=generation,
                join_timeout_s=timeout_s,
                step_timeout_s=settings.step_timeout_s,
            )
        return cls(generation, tensor, expert, joined=True)

    def close(self) -> None:
        """Leaves the groups; a new generation may follow in this process."""
        if self.expert is not None:
            self.expert.close()
        if self.joined and distributed.is_initialized():
            from deepspeed import comm

            comm.destroy_process_group()


def _meet(rank: int, num_ranks: int, generation: int, store: tuple[str, int], timeout_s: float) -> Any:
    """The generation's part of the store, once every rank is there."""
    timeout = timedelta(seconds=timeout_s)
    client = TCPStore(store[0], store[1], is_master=False, wait_for_workers=False, timeout=timeout)
    shared = PrefixStore(f"gen{generation}", client)
    shared.set(f"joined/{rank}", "1")
    try:
        shared.wait([f"joined/{other}" for other in range(num_ranks)], timeout)
    except RuntimeError as error:
        missing = [other for other in range(num_ranks) if not shared.check([f"joined/{other}"])]
        raise TimeoutError(f"ranks {missing} did not join generation {generation} in {timeout_s:g} s") from error
    return shared


def _obstacle(settings: EngineSettings, hosts: tuple[str, ...]) -> str | None:
    """What in the settings keeps shared memory from being used."""
    if settings.device != "cpu" or settings.collectives in ("gloo", "nccl"):
        return "as configured"
    if settings.plan.num_ranks != settings.plan.tensor:
        return "shared memory serves one tensor group alone"
    return "ranks on several hosts" if len(set(hosts)) > 1 else None


def _agree(shared: Any, rank: int, settings: EngineSettings) -> str | None:
    """The ranks' first obstacle to shared memory, the same answer at every rank.

    Rank 0 leaves a mark in its shared memory: equal addresses do not prove that ranks see the same one.
    """
    num_ranks = settings.plan.num_ranks
    ours = shm.obstacle(num_ranks, settings.dtype)
    if ours is None and settings.collectives == "auto":
        ours = shm.crowding(num_ranks * settings.num_threads)
    if rank == 0:
        name = secrets.token_hex(8)
        if ours is None:
            shm.mark(name).touch()
        shared.set("shm/name", name)
    name = shared.get("shm/name").decode()
    if ours is None and not shm.mark(name).exists():
        ours = "ranks with different shared memories"
    shared.set(f"shm/{rank}", ours or "")
    reasons = [shared.get(f"shm/{other}").decode() for other in range(num_ranks)]
    if rank == 0:
        shm.mark(name).unlink(missing_ok=True)
    reason = next((reason for reason in reasons if reason), None)
    if reason is None:
        native.prepare_shared_memory(num_ranks, name)
    return reason


def _initialise(settings: EngineSettings, rank: int, shared: Any, *, use_shared_memory: bool) -> None:
    """Makes the world, and has DeepSpeed wrap it."""
    distributed.init_process_group(
        "gloo",
        store=shared,
        rank=rank,
        world_size=settings.plan.num_ranks,
        timeout=timedelta(seconds=settings.load_timeout_s),
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
        shm.unlink(rank)


def _expert_group(settings: EngineSettings, members: Sequence[int]) -> Any:
    """With the step timeout."""
    backend = "nccl" if settings.device == "cuda" else "gloo"
    return distributed.new_group(list(members), timedelta(seconds=settings.step_timeout_s), backend)


def _tensor_collectives(settings: EngineSettings, rank: int, obstacle: str | None) -> Collectives:
    plan = settings.plan
    place = plan.place(rank)
    backend = "nccl" if settings.device == "cuda" else "gloo"
    groups = []
    for dp_group in range(plan.data):
        members = list(range(dp_group * plan.tensor, (dp_group + 1) * plan.tensor))
        # Every rank makes every group, in one order: torch demands it.
        groups.append(
            (
                distributed.new_group(members, timedelta(seconds=settings.step_timeout_s), backend),
                distributed.new_group(members, timedelta(seconds=settings.load_timeout_s), "gloo"),
            )
        )
    step_group, slow_group = groups[place.dp_group]
    make = ProcessGroupCollectives if obstacle is not None else SharedMemoryCollectives
    kind = _kind(settings, backend, obstacle)
    collectives = make(
        index=place.tensor_index,
        size=plan.tensor,
        first_rank=place.dp_group * plan.tensor,
        step_group=step_group,
        slow_group=slow_group,
        kind=kind,
    )
    device = torch.device(settings.device)
    _check_sum(collectives, getattr(torch, settings.dtype), device)
    (log.warning if kind.startswith("gloo (") else log.info)("rank %d: collectives over %s", rank, kind)
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
