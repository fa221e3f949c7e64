"""Which DP group a new sequence goes to: pure functions of what the front door knows of the groups."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from scheduler.affinity import PrefixAffinity, route_prefix
from scheduler.groups import GroupView, RouteRequest, RoutingPolicy, fit, load_of

__all__ = [
    "POLICIES",
    "EvenSteps",
    "GroupView",
    "LeastLoaded",
    "PowerOfTwoChoices",
    "PrefixAffinity",
    "RoundRobin",
    "RouteRequest",
    "RoutingPolicy",
    "group_imbalance",
    "route_prefix",
]


class RoundRobin:
    """One after the other, however loaded they are. A yardstick for the others."""

    def __init__(self) -> None:
        self._num_chosen = 0

    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        indices = fit(groups, request)
        if not indices:
            return None
        self._num_chosen += 1
        return indices[(self._num_chosen - 1) % len(indices)]


class LeastLoaded:
    """The group with the fewest tokens ahead. Right for one front door; several would all run to the same group."""

    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        return min(fit(groups, request), key=lambda index: load_of(groups[index]), default=None)


class PowerOfTwoChoices:
    """The better of two groups drawn at random, so that front doors with the same old news do not herd.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001): the longest queue is
    O(log log n), with two looks instead of n.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        indices = fit(groups, request)
        drawn = self._rng.sample(indices, min(2, len(indices)))
        return min(drawn, key=lambda index: load_of(groups[index]), default=None)


class EvenSteps:
    """Fills DP groups so that those of an engine have equally many tokens in a step.

    Groups of one engine exchange tokens with each other's experts in every step, so the one with the most tokens sets
    the time of all: first the engine with the least per group, then in it the group with the least.
    """

    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        indices = fit(groups, request)
        by_engine: dict[str, list[int]] = {}
        for index in indices:
            by_engine.setdefault(groups[index].engine, []).append(_step_tokens(groups[index]))
        mean = {engine: sum(tokens) / len(tokens) for engine, tokens in by_engine.items()}

        def key(index: int) -> tuple[float, str, int, tuple[int, int, float]]:
            group = groups[index]
            return (mean[group.engine], group.engine, _step_tokens(group), load_of(group))

        return min(indices, key=key, default=None)


def group_imbalance(groups: Iterable[GroupView]) -> dict[str, float]:
    """By engine: the tokens that its fullest group's next step will have, over the mean of its groups; 1 is even."""
    by_engine: dict[str, list[int]] = {}
    for group in groups:
        if group.healthy:
            by_engine.setdefault(group.engine, []).append(_step_tokens(group))
    return {
        engine: max(tokens) * len(tokens) / sum(tokens) if any(tokens) else 1.0 for engine, tokens in by_engine.items()
    }


def _step_tokens(group: GroupView) -> int:
    """A token for each sequence, and what fits beside of what must be prefilled."""
    num_sequences = max(group.num_running + group.num_waiting, group.num_outstanding)
    num_tokens = num_sequences + group.num_waiting_tokens
    return min(num_tokens, group.max_batch_tokens) if group.max_batch_tokens else num_tokens


POLICIES: Mapping[str, Callable[[random.Random], RoutingPolicy]] = {
    "even-steps": lambda rng: EvenSteps(),
    "least-tokens": lambda rng: LeastLoaded(),
    "power-of-two": PowerOfTwoChoices,
    "prefix-affinity": lambda rng: PrefixAffinity(PowerOfTwoChoices(rng)),
    "prefix-affinity-even-steps": lambda rng: PrefixAffinity(EvenSteps()),
    "round-robin": lambda rng: RoundRobin(),
}
"""By the name used in the configuration."""
