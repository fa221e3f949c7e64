"""Why a plan was chosen, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from scheduler.planner.candidates import keeps_to_one_node, more_redundant, tensors
from scheduler.planner.choose import Considered, Planned
from scheduler.planner.memory import slots_per_rank
from scheduler.planner.shape import Axes, ClusterShape, ModelShape, Wishes
from scheduler.planner.words import count, size

__all__ = ["reasons"]


@dataclass(frozen=True, slots=True)
class _Case:
    model: ModelShape
    cluster: ClusterShape
    wishes: Wishes
    planned: Planned

    @property
    def axes(self) -> Axes:
        return self.planned.axes


def reasons(model: ModelShape, cluster: ClusterShape, wishes: Wishes, planned: Planned) -> tuple[str, ...]:
    """At least one sentence."""
    case = _Case(model, cluster, wishes, planned)
    parts = (_tensor, _pipeline, _data, _experts, _redundant, _idle, _memory)
    return tuple(sentence for part in parts for sentence in part(case))


def _tensor(case: _Case) -> Iterator[str]:
    tensor, noun = case.axes.tensor, case.cluster.rank_noun
    if case.wishes.tensor is not None:
        yield f"tensor {tensor}: as configured"
        return
    smaller = [each for each in case.planned.passed_over if each.axes.tensor < tensor]
    if tensor == 1 and case.model.latent:
        yield (
            "tensor 1: tensor ranks would each hold the whole latent cache, and a rank has room for the attention's "
            "weights undivided"
        )
    elif tensor == 1 and case.axes.pipeline == 1:
        yield f"tensor 1: the model fits one {noun}, so that no rank waits for another in a layer"
    elif tensor > 1 and smaller:
        yield f"tensor {tensor}: {_why_not(smaller[-1], case.wishes)}"
    elif tensor > 1:
        yield f"tensor {tensor}: the {noun}s of a node share each layer"
    if case.wishes.deterministic and case.cluster.largest > 2:
        yield "inference.deterministic allows tensor 1 and 2 only"


def _why_not(other: Considered, wishes: Wishes) -> str:
    memory = other.memory
    text = f"with tensor {other.axes.tensor} a rank's weights would be {size(memory.weight_bytes)}"
    if memory.cache_bytes <= 0:
        return f"{text}, which do not fit {size(memory.memory_bytes)}"
    text = f"{text} and its cache would take {count(memory.cache_tokens, 'token')}"
    if memory.cache_tokens < wishes.sequence_tokens:
        return f"{text} of the {wishes.max_model_len:,} of one sequence (inference.max_model_len)"
    return f"{text}: too few for a batch of {wishes.max_batch_size} (inference.max_batch_size)"


def _pipeline(case: _Case) -> Iterator[str]:
    stages = case.axes.pipeline
    if stages == 1:
        return
    if case.wishes.pipeline is not None:
        yield f"pipeline {stages}: as configured"
    elif keeps_to_one_node(case.model, case.cluster):
        yield f"pipeline {stages}: the model does not fit one node, and experts stay within a node where links are slow"
    else:
        most = max(tensors(case.model, case.cluster, case.wishes, 1))
        yield (
            f"pipeline {stages}: with fewer stages the model does not fit over tensor {most}, the most that heads and "
            "nodes allow, or more of the cluster would stay idle"
        )


def _data(case: _Case) -> Iterator[str]:
    data = case.axes.data
    if case.wishes.data is not None:
        yield f"data {data}: as configured"
    elif data > 1 and case.model.num_experts:
        yield f"data {data}: every group attends to requests of its own, and they share the experts"
    elif data > 1:
        yield f"data {data}: the remaining {case.cluster.rank_noun}s serve groups of their own, which share nothing"


def _experts(case: _Case) -> Iterator[str]:
    axes, cluster = case.axes, case.cluster
    if not case.model.num_experts or axes.expert == 1:
        return
    held = slots_per_rank(case.model, axes)
    even = held * axes.expert == case.model.num_experts + axes.redundant_experts
    each = f"{held} on each" if even else f"up to {held} on each"
    yield f"{case.model.num_experts} experts are spread over {axes.expert} ranks, {each}"
    if cluster.fast_links and axes.pipeline == 1 and axes.num_ranks > cluster.largest:
        yield "links between nodes are taken to be fast (cluster.network.links: slow keeps experts within a node)"


def _redundant(case: _Case) -> Iterator[str]:
    if case.wishes.redundant_experts is not None or not more_redundant(case.model, case.axes):
        return
    redundant = case.axes.redundant_experts
    yield (
        f"{redundant} redundant experts: they even out the load, and are there when a rank is lost"
        if redundant
        else "no redundant experts: they would take memory that the cache needs"
    )


def _idle(case: _Case) -> Iterator[str]:
    cluster, axes = case.cluster, case.axes
    idle = cluster.num_places - axes.num_ranks
    if idle <= 0:
        return
    text = f"{idle} of {count(cluster.num_places, cluster.rank_noun)} stay idle"
    if keeps_to_one_node(case.model, cluster) and axes.num_ranks <= cluster.largest:
        text += f"; cluster.engines: {len(cluster.nodes)} would serve each node on its own"
    yield text


def _memory(case: _Case) -> Iterator[str]:
    memory = case.planned.memory
    text = f"a rank has {size(memory.memory_bytes)}: weights {size(memory.weight_bytes)}"
    if memory.reserve_bytes:
        text += f", runtime and steps {size(memory.reserve_bytes)}"
    tokens = count(memory.cache_tokens, "token")
    yield f"{text}, cache {size(memory.cache_bytes)} for {tokens}, left {size(memory.left_bytes)}"
    if not case.planned.comfortable:
        yield "the cache is too small for a whole batch of ordinary sequences: some will wait"
