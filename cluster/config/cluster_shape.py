"""The cluster as the planner sees it: what one engine may have of each node."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config.machine import Machine, Node
from cluster.config.schema import Config
from cluster.config.sizes import parse_share_or_size, parse_size
from scheduler.planner.shape import ClusterShape, NodeShape

__all__ = ["CACHE_SHARE", "GPU_CACHE_SHARE", "cluster_shape", "ranks_on_a_node"]

# Of the memory that is free after loading: what the caches of all ranks on one machine take together, and what the
# cache of a GPU's one rank takes.
CACHE_SHARE = 0.5
GPU_CACHE_SHARE = 0.9
# The CUDA context, NCCL's buffers and what allocators lose; an estimate, not measured.
_GPU_RUNTIME_BYTES = 2 * 2**30


def cluster_shape(
    config: Config, machine: Machine, device: str, *, step_bytes: int, given: bool = False
) -> ClusterShape | None:
    """None where the memory of GPUs is not known. Raises ValueError where engines are more than GPUs.

    For a plan that is `given` all GPUs are there: Ray finds room for every engine's ranks wherever it is.
    """
    links = config.cluster.network.links
    if device == "cpu":
        nodes = [_cpu_node(config, node, _beside(config, machine)) for node in machine.all_nodes]
        return ClusterShape(
            nodes=_of_one_engine(config, nodes),
            shared_memory=True,
            cache_share=CACHE_SHARE,
            fast_links=links != "slow",
            rank_noun="rank",
        )
    nodes = _gpu_nodes(config, machine, 1 if given else _beside(config, machine))
    if any(not node.memory_bytes for node in nodes):
        return None
    return ClusterShape(
        nodes=tuple(nodes) if given else _of_one_engine(config, nodes),
        shared_memory=False,
        cache_share=GPU_CACHE_SHARE,
        reserve_bytes=_GPU_RUNTIME_BYTES + step_bytes,
        fast_links=links != "slow",
        rank_noun="GPU",
    )


def ranks_on_a_node(config: Config, machine: Machine, num_ranks: int) -> int:
    """At most so many of all engines' ranks, with `num_ranks` each, share a node's cores and memory."""
    total, nodes = num_ranks * config.cluster.engines, len(machine.all_nodes)
    threads = config.resources.cpu_threads
    room = 1 if threads == "auto" or nodes == 1 else max(1, machine.cores // threads)
    return min(total, max(room, -(-total // nodes)))


def _beside(config: Config, machine: Machine) -> int:
    """Engines that share a node."""
    return -(-config.cluster.engines // len(machine.all_nodes))


def _of_one_engine(config: Config, nodes: Sequence[NodeShape]) -> tuple[NodeShape, ...]:
    """The smallest part that any engine may get."""
    count = max(1, len(nodes) // config.cluster.engines)
    ordered = sorted((node for node in nodes if node.ranks), key=lambda node: (node.ranks, node.memory_bytes))
    if not ordered:
        raise ValueError(f"cluster.engines: {config.cluster.engines} engines are more than the GPUs that were found")
    return tuple(ordered[:count])


def _cpu_node(config: Config, node: Node, beside: int) -> NodeShape:
    """One rank has all cores of its engine, unless the threads of a rank are given."""
    threads = config.resources.cpu_threads
    limit = parse_share_or_size(config.resources.memory_limit, node.memory_bytes, "resources.memory_limit")
    return NodeShape(
        ranks=1 if threads == "auto" else max(1, node.cores // threads // beside),
        memory_bytes=limit // beside,
        free_bytes=node.free_bytes // beside,
    )


def _gpu_nodes(config: Config, machine: Machine, beside: int) -> list[NodeShape]:
    """With as many GPUs as may be used, the fullest nodes first."""
    given = config.resources.gpu_memory
    wanted = machine.gpus if config.resources.gpus == "auto" else config.resources.gpus
    found = []
    for node in sorted(machine.all_nodes, key=lambda node: -node.gpus):
        used = min(node.gpus, wanted)
        wanted -= used
        if used:
            known = (node.gpu_memory_bytes or 0) if given == "auto" else parse_size(given, "resources.gpu_memory")
            found.append(NodeShape(ranks=used // beside, memory_bytes=known, free_bytes=known))
    return found
