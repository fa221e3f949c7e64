"""Ends a rank's process that may be frozen, on whatever host it is: SIGKILL, which closes all its connections."""

from __future__ import annotations

import logging
import os
import signal

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.parallel.native import interface_of

__all__ = ["kill_process"]

log = logging.getLogger(__name__)

_NAME = "RankActor"  # Ray names its processes after what they run
_TIMEOUT_S = 1.0  # nobody waits longer for a host that may be gone; where it comes back, it is killed then


def kill_process(host: str, pid: int) -> None:
    """Nothing happens where the host cannot be reached, or where the process is a rank's no more."""
    if interface_of(host) is not None:
        _kill(pid)
        return
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == host]
    if not nodes:
        log.warning("%s is not in the cluster any more: what runs there is cut off, not ended", host)
        return
    strategy = NodeAffinitySchedulingStrategy(nodes[0], soft=False)
    killed = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=strategy).remote(pid)
    try:
        ray.get(killed, timeout=_TIMEOUT_S)
    except RayError as error:
        log.warning("%s has not ended process %d yet: %s", host, pid, str(error).splitlines()[0])


def _kill(pid: int) -> None:
    try:
        if any(_NAME in part for part in psutil.Process(pid).cmdline()):
            os.kill(pid, signal.SIGKILL)
            log.warning("process %d was killed", pid)
    except (psutil.Error, ProcessLookupError):
        log.debug("process %d is gone already", pid)
