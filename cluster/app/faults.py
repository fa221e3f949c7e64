"""Faults on purpose: finds the process that a target names, and harms it on its own node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.app import disturb, guard
from cluster.chaos.schedule import FAULTS
from cluster.front_door.errors import InvalidRequest, RequestNotFound
from cluster.roster import EngineReport, FrontDoorReport
from cluster.roster_actor import find_roster
from protos.shoal.v1 import admin_pb2

__all__ = ["Process", "inject", "processes_of"]

_LONGEST_S = 600.0

Process = tuple[str, int]
"""A node's address and a pid there."""


async def inject(
    request: admin_pb2.InjectRequest, engines: Sequence[EngineReport], front_doors: Sequence[FrontDoorReport]
) -> admin_pb2.InjectResponse:
    """Raises InvalidRequest or RequestNotFound. Comes back when all is on its way, not when it is over."""
    if request.fault not in FAULTS:
        raise InvalidRequest(f"fault must be one of {', '.join(FAULTS)}, not {request.fault!r}", field="fault")
    if request.fault != "kill" and not 0 < request.duration_s <= _LONGEST_S:
        raise InvalidRequest(f"duration_s must be above 0 and at most {_LONGEST_S:g}", field="duration_s")
    if request.fault == "slow" and not 0 < request.share < 1:
        raise InvalidRequest("share must be between 0 and 1", field="share")
    found = await _actor(request.target) or processes_of(request.target, engines, front_doors)
    if not found:
        raise RequestNotFound(f"there is no {request.target!r}; `shoal status` shows what is", field="target")
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    here = ray.get_runtime_context().get_node_id()
    for node, pid in found:
        # Without an address of its own, a rank is on the only node there is.
        where = NodeAffinitySchedulingStrategy(nodes.get(node, here), soft=False)
        await _harm.options(scheduling_strategy=where).remote(pid, request.fault, request.duration_s, request.share)
    return admin_pb2.InjectResponse(node=found[0][0], pids=[pid for _, pid in found])


def processes_of(
    target: str, engines: Sequence[EngineReport], front_doors: Sequence[FrontDoorReport]
) -> Sequence[Process]:
    """The processes that a target names; none where there is no such thing."""
    for door in front_doors:
        if target == f"front-door/{door.id}":
            return [(door.node, door.pid)]
    for engine in engines:
        ranks = engine.status.ranks
        if target == engine.engine:
            return [(rank.node, rank.pid) for rank in ranks]
        if target == f"{engine.engine}/leader":
            return [(engine.node, engine.pid)]
        for rank in ranks:
            if target == f"{engine.engine}/rank-{rank.rank}":
                return [(rank.node, rank.pid)]
    return ()


async def _actor(target: str) -> Sequence[Process]:
    """Those that report themselves to nobody."""
    if target == "roster":
        return [await find_roster().whereabouts.remote()]
    if target == "controller":
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        return [await controller.__ray_call__.remote(_whereabouts)]
    return ()


def _whereabouts(actor: object) -> Process:
    return ray.util.get_node_ip_address(), os.getpid()


def _spawn(pid: int, fault: str, duration_s: float, share: float) -> None:
    command = [sys.executable, "-I", "-S", str(Path(disturb.__file__))]
    command += [str(pid), guard.start_time(pid), fault, str(duration_s), str(share)]
    subprocess.run(command, check=True)  # noqa: S603  # a script of ours


_harm: Any = ray.remote(num_cpus=0, max_retries=0)(_spawn)
