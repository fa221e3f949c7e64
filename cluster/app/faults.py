"""Faults on purpose: finds the process that a target names, and harms it on its own node."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.app import cut_off, disturb, guard
from cluster.chaos.injector import Process
from cluster.chaos.schedule import FAULTS, NODE
from cluster.chaos.targets import processes_of
from cluster.front_door.errors import InvalidRequest, RequestNotFound, Unavailable
from cluster.roster import EngineReport, FrontDoorReport
from cluster.roster_actor import find_roster
from protos.shoal.v1 import admin_pb2

__all__ = ["inject"]

_LONGEST_S = 600.0


async def inject(
    request: admin_pb2.InjectRequest, engines: Sequence[EngineReport], front_doors: Sequence[FrontDoorReport]
) -> admin_pb2.InjectResponse:
    """Raises InvalidRequest, RequestNotFound or Unavailable. Comes back when all is on its way, not when it is over."""
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

    async def harm(node: str, script: ModuleType, arguments: Sequence[object], pid: int = 0) -> None:
        # Without an address of its own, a rank is on the only node there is.
        where = NodeAffinitySchedulingStrategy(nodes.get(node, here), soft=False)
        trouble = await _there.options(scheduling_strategy=where).remote(script.__name__, arguments, pid)
        if trouble:
            raise Unavailable(f"{request.fault} of {request.target} on {node}: {trouble}")

    if request.fault == "partition" and request.target.startswith(NODE):
        node = request.target.removeprefix(NODE)
        others = sorted(nodes.keys() - {node})
        if not others:
            raise InvalidRequest(f"{node} is the only node: there is nothing to cut it off from", field="target")
        await harm(node, cut_off, (request.duration_s, "node", *others))
    elif request.fault == "partition":
        await asyncio.gather(*(harm(node, cut_off, (request.duration_s, "process"), pid) for node, pid in found))
    else:
        how = (request.fault, request.duration_s, request.share)
        await asyncio.gather(*(harm(node, disturb, how, pid) for node, pid in found))
    return admin_pb2.InjectResponse(node=found[0][0], pids=[pid for _, pid in found])


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


def _run(script: str, arguments: Sequence[object], pid: int) -> str:
    """Why a script of ours did not begin; nothing where it did, and goes on. `pid`: whom it is about."""
    whom = (pid, guard.start_time(pid)) if pid else ()
    command = [sys.executable, "-m", script, *map(str, (*arguments, *whom))]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)  # noqa: S603
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


_there: Any = ray.remote(num_cpus=0, max_retries=0)(_run)
