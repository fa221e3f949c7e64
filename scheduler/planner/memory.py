"""What each rank of a plan holds: weights, cache, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.planner.runs import even_runs
from scheduler.planner.shape import Axes, ClusterShape, ModelShape, Wishes

__all__ = ["RankMemory", "rank_memory", "slots_per_rank", "stage_layers", "stage_weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Of a rank of the stage with the least room for tokens. What is free now is what may be taken at all.

    `cache_bytes` is what the rank will take, for `cache_tokens` tokens; below zero, the weights lack so much.
    `needed_bytes` is the memory with which one sequence of full length would fit.
    """

    memory_bytes: int
    reserve_bytes: int
    weight_bytes: int
    cache_bytes: int
    cache_tokens: int
    needed_bytes: int

    @property
    def left_bytes(self) -> int:
        return self.memory_bytes - self.reserve_bytes - self.weight_bytes - max(0, self.cache_bytes)


def slots_per_rank(model: ModelShape, axes: Axes) -> int:
    """Routed experts of a layer on the rank with most of them."""
    return -(-(model.num_experts + axes.redundant_experts) // axes.expert)


def stage_layers(model: ModelShape, num_stages: int) -> tuple[range, ...]:
    """As `workers.model.layer_split.split_layers` cuts."""
    costs = [layer.cost for layer in model.layers]
    costs[-1] += model.head_cost
    return even_runs(tuple(costs), num_stages)


def stage_weights(model: ModelShape, axes: Axes, layers: range) -> int:
    """Bytes of the weights of a rank of the stage with those layers."""
    slots, tensor = slots_per_rank(model, axes), axes.tensor
    whole = divided = 0
    for layer in (model.layers[number] for number in layers):
        whole += layer.whole_bytes + slots * layer.expert_bytes
        divided += layer.divided_bytes
    is_first, is_last = layers.start == 0, layers.stop == len(model.layers)
    if is_first:
        divided += model.embedding_bytes
    if is_last:
        divided += model.packed_head_bytes
        if not (model.tied and is_first):
            divided += model.head_bytes
    return whole - (-divided // tensor)


def rank_memory(model: ModelShape, cluster: ClusterShape, wishes: Wishes, axes: Axes) -> RankMemory:
    """Of the poorest rank."""
    return min(_stages(model, cluster, wishes, axes), key=lambda found: (found.cache_tokens, found.cache_bytes))


def _stages(model: ModelShape, cluster: ClusterShape, wishes: Wishes, axes: Axes) -> Sequence[RankMemory]:
    memory, free = cluster.rank_memory(axes.num_ranks)
    per_layer = model.cache_whole_bytes + model.cache_divided_bytes // axes.tensor
    most_tokens = wishes.sequence_tokens * wishes.max_batch_size
    found = []
    for layers in stage_layers(model, axes.pipeline):
        weights = stage_weights(model, axes, layers)
        per_token = per_layer * len(layers)
        least = per_token * wishes.sequence_tokens
        cache, needed = _room(cluster, wishes, memory, free, weights, least)
        if model.loaded_whole and axes.tensor > 1:
            whole = stage_weights(model, Axes(), layers)
            needed = max(needed, whole)
            if whole > min(memory, free):
                cache = min(memory, free) - whole
        tokens = max(0, cache) // per_token // wishes.block_size * wishes.block_size
        found.append(
            RankMemory(
                memory_bytes=min(memory, free),
                reserve_bytes=cluster.reserve_bytes,
                weight_bytes=weights,
                cache_bytes=min(cache, most_tokens * per_token),
                cache_tokens=min(tokens, most_tokens),
                needed_bytes=needed,
            )
        )
    return found


def _room(cluster: ClusterShape, wishes: Wishes, memory: int, free: int, weights: int, least: int) -> tuple[int, int]:
    """What a rank's cache may take, and the memory with which it could take `least`."""
    held = cluster.reserve_bytes + weights
    bound = min(memory, free) - held
    if wishes.cache_bytes is not None:
        cache = wishes.cache_bytes if bound >= wishes.cache_bytes else min(bound, -1)
        return cache, held + max(wishes.cache_bytes, least)
    share = int((free - held) * cluster.cache_share) if free > held else free - held
    return min(memory - held, share), held + int(least / cluster.cache_share)
