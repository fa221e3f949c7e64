"""A cluster is described by what its nodes say; what one does not say is assumed, and said to be."""

from __future__ import annotations

from typing import Any

from cluster.app.nodes import describe
from cluster.config.machine import Machine

GB = 10**9
OWN = Machine(cores=4, memory_bytes=8 * GB, free_bytes=6 * GB, gpus=0, fast_bfloat16=True)


def entry(name: str, **resources: float) -> dict[str, Any]:
    return {"NodeManagerHostname": name, "Resources": {"CPU": 16.0, "memory": 40.0 * GB, **resources}}


def told(memory: int, gpu_memory: int | None = None, *, fast: bool = True) -> Machine:
    return Machine(
        cores=32,
        memory_bytes=memory * GB,
        free_bytes=memory * GB - GB,
        gpus=0 if gpu_memory is None else 8,
        fast_bfloat16=fast,
        gpu_memory_bytes=None if gpu_memory is None else gpu_memory * GB,
    )


def test_the_least_of_the_nodes_counts_and_the_gpus_of_all() -> None:
    found = describe([entry("a", GPU=8), entry("b", GPU=4)], [told(100, 80), told(60, 40, fast=False)], OWN)
    assert (found.cores, found.memory_bytes, found.gpus) == (16, 60 * GB, 12), "cores are those that Ray gives away"
    assert (found.gpu_memory_bytes, found.fast_bfloat16) == (40 * GB, False)
    assert [node.gpus for node in found.all_nodes] == [8, 4]
    assert not found.notes


def test_a_silent_node_is_taken_at_rays_word() -> None:
    found = describe([entry("a"), entry("b", GPU=2)], [told(100), None], OWN)
    assert found.memory_bytes == 40 * GB
    assert found.gpu_memory_bytes is None
    assert found.notes == ("b did not say what memory there is: Ray's estimate was taken",)


def test_where_there_are_no_nodes_there_is_this_machine() -> None:
    assert describe([], [], OWN) == OWN
