"""What keeps every plan from working, and what would work instead: each remedy was tried before it is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from scheduler.planner.candidates import candidates, pipelines
from scheduler.planner.choose import Considered, choose
from scheduler.planner.memory import rank_memory
from scheduler.planner.shape import ClusterShape, ModelShape, Wishes
from scheduler.planner.words import count, size

__all__ = ["Remedy", "refusal"]

_MORE_NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
_ROUNDING_BYTES = 2**20
_FEWEST_TOKENS = 256  # a shorter length is no remedy


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the configuration, and what the planner would then be asked."""

    text: str
    model: ModelShape
    cluster: ClusterShape
    wishes: Wishes


def refusal(model: ModelShape, cluster: ClusterShape, wishes: Wishes, remedies: Sequence[Remedy] = ()) -> str:
    """The reason why `choose` found nothing, with the key at fault and values that work.

    Of remedies that change the same key the first that works is told.
    """
    considered = _considered(model, cluster, wishes)
    if not considered:
        return _no_room(model, cluster, wishes)
    nearest = min(considered, key=lambda each: each.memory.needed_bytes - each.memory.memory_bytes)
    hints = [*_remedies(model, cluster, wishes, remedies, considered)]
    advice = "; ".join(hints) if hints else "a smaller model, or more memory"
    return f"parallel: {_what_lacks(nearest, wishes)}; what would fit: {advice}"


def _no_room(model: ModelShape, cluster: ClusterShape, wishes: Wishes) -> str:
    """Axes that were asked for do not go into the cluster, whatever the memory."""
    asked = {"data": wishes.data, "pipeline": wishes.pipeline, "tensor": wishes.tensor}
    fixed = {axis: value for axis, value in asked.items() if value is not None}
    needed = prod(fixed.values())
    if wishes.redundant_experts:
        fixed["redundant_experts"] = wishes.redundant_experts
    named = " x ".join(f"parallel.{axis} {value}" for axis, value in fixed.items())
    there = count(cluster.num_places, cluster.rank_noun)
    freed = replace(wishes, data=None, pipeline=None, tensor=None, redundant_experts=None)
    planned = choose(model, cluster, freed)
    hint = f"parallel: auto would take {planned.axes}" if planned else "no other plan fits either"
    room = f"{cluster.groups_of(wishes.tensor or 1)} tensor groups" if wishes.tensor else there
    return f"{named} needs {count(needed, cluster.rank_noun)} an engine, and there is room for {room} ({there}); {hint}"


def _what_lacks(nearest: Considered, wishes: Wishes) -> str:
    axes, memory = nearest.axes, nearest.memory
    which = f"with {axes}" if not wishes.open else f"no plan fits; with {axes}, the nearest,"
    text = f"not enough memory: {which} a rank needs {size(memory.needed_bytes)} and has {size(memory.memory_bytes)}"
    reserved = f", {size(memory.reserve_bytes)} for runtime and steps" if memory.reserve_bytes else ""
    text += f" ({size(memory.weight_bytes)} of weights{reserved}, and "
    if wishes.cache_bytes is not None:
        return f"{text}{size(wishes.cache_bytes)} of cache by resources.cache_size)"
    return f"{text}a cache for one sequence of inference.max_model_len {wishes.max_model_len:,})"


def _remedies(
    model: ModelShape,
    cluster: ClusterShape,
    wishes: Wishes,
    remedies: Sequence[Remedy],
    considered: Sequence[Considered],
) -> Iterator[str]:
    if length := _shorter(model, cluster, wishes):
        yield f"inference.max_model_len: {length}"
    if not wishes.open:
        freed = replace(wishes, data=None, pipeline=None, tensor=None, redundant_experts=None)
        if planned := choose(model, cluster, freed):
            yield f"parallel: auto, which would take {planned.axes}"
    told: set[str] = set()
    for remedy in remedies:
        key = remedy.text.partition(":")[0]
        if key in told:
            continue
        if choose(remedy.model, remedy.cluster, remedy.wishes):
            told.add(key)
            yield remedy.text
        elif length := _shorter(remedy.model, remedy.cluster, remedy.wishes):
            told.add(key)
            yield f"{remedy.text} with inference.max_model_len: {length}"
    for times in _MORE_NODES if wishes.open else ():
        if choose(model, cluster.times(times), wishes):
            yield f"{len(cluster.nodes) * times} nodes like {'this one' if len(cluster.nodes) == 1 else 'these'}"
            break
    enough = min(each.memory.needed_bytes for each in considered) + _ROUNDING_BYTES
    if not cluster.shared_memory and choose(model, cluster.with_memory(enough), wishes):
        yield f"{cluster.rank_noun}s with {size(enough)}"


def _shorter(model: ModelShape, cluster: ClusterShape, wishes: Wishes) -> int:
    """The longest `max_model_len` with which a plan fits; 0: none worth its name does."""
    tokens = max((_tokens(each) for each in _considered(model, cluster, wishes)), default=0)
    length = min(tokens, wishes.max_model_len - 1) // wishes.block_size * wishes.block_size
    fits = length >= _FEWEST_TOKENS and choose(model, cluster, replace(wishes, max_model_len=length))
    return length if fits else 0


def _tokens(considered: Considered) -> int:
    return considered.memory.cache_tokens if considered.memory.cache_bytes > 0 else 0


def _considered(model: ModelShape, cluster: ClusterShape, wishes: Wishes) -> list[Considered]:
    return [
        Considered(axes, rank_memory(model, cluster, wishes, axes))
        for pipeline in pipelines(model, cluster, wishes)
        for axes in candidates(model, cluster, wishes, pipeline)
    ]
