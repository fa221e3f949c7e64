"""The plans that a model and a cluster allow, in the order in which they are wanted.

Pipelines last, since a token waits for one stage after the other; within them tensor ranks as few as fit, since they
wait for each other in every layer; data with what is left. Memory is looked at elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from scheduler.planner.shape import Axes, ClusterShape, ModelShape, Wishes

__all__ = ["MOST_DETERMINISTIC_TENSOR", "candidates", "keeps_to_one_node", "more_redundant", "pipelines", "tensors"]

# A sum over more ranks is made in an order that depends on how much is summed.
MOST_DETERMINISTIC_TENSOR = 2


def pipelines(model: ModelShape, cluster: ClusterShape, wishes: Wishes) -> Sequence[int]:
    """Numbers of stages to try, in order."""
    if wishes.pipeline is not None:
        return (wishes.pipeline,) if wishes.pipeline <= model.most_stages else ()
    return range(1, max(1, min(model.most_stages, cluster.num_places)) + 1)


def candidates(model: ModelShape, cluster: ClusterShape, wishes: Wishes, pipeline: int) -> Iterator[Axes]:
    """Plans of so many stages; redundant experts are none, unless their number was asked for."""
    redundant = wishes.redundant_experts or 0
    found: list[Axes] = []
    for tensor in tensors(model, cluster, wishes, pipeline):
        data = _most_data(model, cluster, wishes, pipeline, tensor)
        axes = Axes(data=data, pipeline=pipeline, tensor=tensor, redundant_experts=redundant)
        if data and _can_copy(model, axes):
            found.append(axes)
    yield from found
    if cluster.shared_memory and wishes.data is None:  # fewer ranks have more of it each
        for axes in found:
            data = axes.data
            while data > 1:
                data //= 2
                fewer = replace(axes, data=data)
                if _can_copy(model, fewer):
                    yield fewer


def tensors(model: ModelShape, cluster: ClusterShape, wishes: Wishes, pipeline: int) -> Sequence[int]:
    """Sizes of the tensor axis to try, in order: within a node, and such that the heads divide."""
    if wishes.tensor is not None:
        return (wishes.tensor,)
    most = min(cluster.largest, MOST_DETERMINISTIC_TENSOR) if wishes.deterministic else cluster.largest
    if model.loaded_whole:
        most = min(most, model.num_kv_heads)
    sizes = [size for size in model.tensor_sizes if size <= most]
    # Only neighbours on a node may share a stage's experts there: the widest stages have most room.
    return sizes[::-1] if pipeline > 1 and keeps_to_one_node(model, cluster) else sizes


def keeps_to_one_node(model: ModelShape, cluster: ClusterShape) -> bool:
    """Whether routed experts are not to be spread over several nodes."""
    return bool(model.num_experts) and len(cluster.nodes) > 1 and not cluster.fast_links


def more_redundant(model: ModelShape, axes: Axes) -> int:
    """So many redundant experts that every rank has one more than it must; 0 where there is no room for copies."""
    if not model.num_experts or axes.data == 1:
        return 0
    slots = model.num_experts // axes.expert + 1
    return slots * axes.expert - model.num_experts if slots <= model.num_experts else 0


def _can_copy(model: ModelShape, axes: Axes) -> bool:
    """Whether experts and redundant ones divide by the ranks, and no rank would hold one twice."""
    if not axes.redundant_experts:
        return True
    slots, rest = divmod(model.num_experts + axes.redundant_experts, axes.expert)
    return axes.data > 1 and not rest and slots <= model.num_experts


def _most_data(model: ModelShape, cluster: ClusterShape, wishes: Wishes, pipeline: int, tensor: int) -> int:
    """DP groups that there is room for; 0: none."""
    groups = cluster.groups_of(tensor)
    if keeps_to_one_node(model, cluster):
        groups = cluster.largest // tensor if pipeline == 1 else min(groups, pipeline)
    room = groups // pipeline
    if cluster.shared_memory and not room and (wishes.tensor or wishes.pipeline or wishes.data):
        room = 1  # what was asked for goes first; its ranks share cores
    if wishes.data is not None:
        return wishes.data if wishes.data <= room or cluster.shared_memory else 0
    if model.num_experts:
        room = min(room, model.num_experts // tensor)
    return room
