"""Who goes where ranks live and cannot reach each other: the same answer whoever asks, and the larger part stays."""

from __future__ import annotations

from collections.abc import Mapping, Set

from workers.parallel.plan import ParallelPlan

__all__ = ["to_fence"]


def to_fence(plan: ParallelPlan, cuts: Mapping[int, Set[int]]) -> dict[int, str]:
    """Ranks to be fenced, and why, until no two of those that stay are cut off from each other.

    `cuts` names, by rank, those that it cannot reach; one way counts for both. Of the DP groups, which go as a whole,
    the one goes first that is cut off from most others, of equals the one with the highest number.
    """
    apart: dict[int, set[int]] = {}
    for rank, others in cuts.items():
        for other in others:
            mine, theirs = plan.place(rank).dp_group, plan.place(other).dp_group
            apart.setdefault(mine, set()).add(theirs)
            apart.setdefault(theirs, set()).add(mine)
    found: dict[int, str] = {}
    while apart := {group: others for group, others in apart.items() if others}:
        worst = max(apart, key=lambda group: (len(apart[group]), group))
        reason = f"its DP group cannot reach {_named(apart.pop(worst))}"
        found |= {rank: f"rank {rank}: {reason}" for rank in plan.group(worst)}
        for others in apart.values():
            others.discard(worst)
    return found


def _named(groups: Set[int]) -> str:
    return "DP group" + "s" * (len(groups) > 1) + " " + ", ".join(map(str, sorted(groups)))
