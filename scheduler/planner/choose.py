"""Chooses a plan: the first that is wanted of those that fit, and says why.

A plan fits where every rank has room for its weights and a cache that takes one sequence of full length. Of as many
stages, one whose cache takes a whole batch of ordinary sequences goes before one that only just fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scheduler.planner.candidates import candidates, more_redundant, pipelines
from scheduler.planner.memory import RankMemory, rank_memory
from scheduler.planner.shape import Axes, ClusterShape, ModelShape, Wishes

__all__ = ["Considered", "Planned", "choose"]

# Of a sequence of ordinary length, prompt and answer together.
ORDINARY_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Considered:
    """A plan, and what a rank of it would hold."""

    axes: Axes
    memory: RankMemory


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What was chosen. `passed_over` are those that were wanted more and did not fit, with as many stages and fewer
    tensor ranks; `comfortable`: its cache takes a whole batch."""

    axes: Axes
    memory: RankMemory
    comfortable: bool
    passed_over: tuple[Considered, ...] = ()


def choose(model: ModelShape, cluster: ClusterShape, wishes: Wishes) -> Planned | None:
    """None where no plan fits."""
    found: Planned | None = None
    for pipeline in pipelines(model, cluster, wishes):
        planned = _of_stages(model, cluster, wishes, pipeline)
        if found is None or (planned is not None and _does_more(planned.axes, found.axes)):
            found = planned
        # More stages than needed are worth it only for ranks that would else stay idle.
        if found is not None and (found.axes.pipeline == 1 or found.axes.num_ranks == cluster.num_places):
            break
    return found


def _does_more(deeper: Axes, axes: Axes) -> bool:
    return deeper.num_ranks > axes.num_ranks and deeper.data >= axes.data


def _of_stages(model: ModelShape, cluster: ClusterShape, wishes: Wishes, pipeline: int) -> Planned | None:
    considered = [
        Considered(axes, rank_memory(model, cluster, wishes, axes))
        for axes in candidates(model, cluster, wishes, pipeline)
    ]
    goals = tuple(_goals(wishes))
    for tokens in goals:
        for index, each in enumerate(considered):
            if each.memory.cache_tokens >= tokens and each.memory.cache_bytes > 0:
                chosen = Planned(
                    axes=each.axes,
                    memory=each.memory,
                    comfortable=each.memory.cache_tokens >= max(goals),
                    passed_over=tuple(considered[:index]),
                )
                return _with_redundant(model, cluster, wishes, chosen, tokens)
    return None


def _goals(wishes: Wishes) -> Iterator[int]:
    """Tokens that a cache should take, at first, and must take."""
    yield max(wishes.sequence_tokens, wishes.max_batch_size * min(wishes.max_model_len, ORDINARY_TOKENS))
    yield wishes.sequence_tokens


def _with_redundant(model: ModelShape, cluster: ClusterShape, wishes: Wishes, chosen: Planned, tokens: int) -> Planned:
    """The same with redundant experts, where they are ours to choose and cost no more than what the cache can spare."""
    redundant = more_redundant(model, chosen.axes)
    if wishes.redundant_experts is not None or not redundant:
        return chosen
    axes = replace(chosen.axes, redundant_experts=redundant)
    memory = rank_memory(model, cluster, wishes, axes)
    if memory.cache_tokens < tokens or memory.cache_bytes <= 0:
        return chosen
    return replace(chosen, axes=axes, memory=memory)
