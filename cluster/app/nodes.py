"""What the nodes of a Ray cluster have, as each of them says; Ray's own figures stand in for one that is silent."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.machine import Machine, Node, this_machine

__all__ = ["cluster_machine", "describe"]

log = logging.getLogger(__name__)

_ANSWER_S = 30.0


def cluster_machine() -> Machine:
    """Of the cluster that this process has joined: the least of its nodes, the GPUs of all, and every node."""
    living = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return describe(living, _ask(living), this_machine())


def describe(living: Sequence[Mapping[str, Any]], told: Sequence[Machine | None], own: Machine) -> Machine:
    """From Ray's entries, and what each node said of itself; `own` where there are none."""
    both = list(zip(living, told, strict=True))
    nodes = tuple(_node(node["Resources"], machine) for node, machine in both)
    if not nodes:
        return own
    silent = [node["NodeManagerHostname"] for node, machine in both if machine is None]
    gpu_memory = [node.gpu_memory_bytes for node in nodes if node.gpus]
    known = [size for size in gpu_memory if size is not None]
    return Machine(
        cores=min(node.cores for node in nodes),
        memory_bytes=min(node.memory_bytes for node in nodes),
        free_bytes=min(node.free_bytes for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        fast_bfloat16=all(machine.fast_bfloat16 for machine in (own, *told) if machine is not None),
        gpu_memory_bytes=min(known) if known and len(known) == len(gpu_memory) else None,
        nodes=nodes,
        notes=(f"{', '.join(silent)} did not say what memory there is: Ray's estimate was taken",) if silent else (),
    )


def _ask(living: Sequence[Mapping[str, Any]]) -> list[Machine | None]:
    ask = ray.remote(this_machine)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in living]
    answers = [ask.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote() for place in places]
    give_up_s = time.monotonic() + _ANSWER_S
    found: list[Machine | None] = []
    for node, answer in zip(living, answers, strict=True):
        try:
            found.append(ray.get(answer, timeout=max(0.1, give_up_s - time.monotonic())))
        except (RayError, GetTimeoutError, ImportError, AttributeError) as error:
            log.warning("%s does not say what it has: %s", node["NodeManagerHostname"], str(error).splitlines()[0])
            found.append(None)
    return found


def _node(resources: Mapping[str, float], machine: Machine | None) -> Node:
    """Cores and GPUs are those that Ray gives away."""
    cores, gpus = int(resources["CPU"]), int(resources.get("GPU", 0))
    if machine is None:
        memory = int(resources.get("memory", 0))
        return Node(cores=cores, memory_bytes=memory, free_bytes=memory, gpus=gpus)
    (own,) = machine.all_nodes
    return replace(own, cores=cores, gpus=gpus)
