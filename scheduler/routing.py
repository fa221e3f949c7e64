"""Which DP group a new sequence goes to: pure functions of what the front door knows of the groups."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["POLICIES", "GroupView", "LeastLoaded", "PowerOfTwoChoices", "RouteRequest", "RoutingPolicy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupView:
    """A DP group as one front door sees it.

    The group itself reports the first block of numbers, once per step and for all front doors. `outstanding_tokens`
    is this front door's own count of what it has sent there and not yet got back: it never lags.
    """

    key: str
    engine: str
    healthy: bool
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    outstanding_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteRequest:
    """What a policy may know of a sequence. Groups in `avoid` have just failed it, or refused it."""

    num_tokens: int
    max_tokens: int
    avoid: frozenset[str] = frozenset()


class RoutingPolicy(Protocol):
    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        """The index of the group to use; None where no group is fit."""
        ...


class LeastLoaded:
    """The group with the fewest tokens ahead. Right for one front door; several would all run to the same group."""

    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        return min(_fit(groups, request), key=lambda index: _load_of(groups[index]), default=None)


class PowerOfTwoChoices:
    """The better of two groups drawn at random, so that front doors with the same old news do not herd.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001): the longest queue is
    O(log log n), with two looks instead of n.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        fit = _fit(groups, request)
        drawn = self._rng.sample(fit, min(2, len(fit)))
        return min(drawn, key=lambda index: _load_of(groups[index]), default=None)


POLICIES: Mapping[str, Callable[[random.Random], RoutingPolicy]] = {
    "least-loaded": lambda rng: LeastLoaded(),
    "power-of-two": PowerOfTwoChoices,
}
"""By the name used in the configuration."""


def _fit(groups: Sequence[GroupView], request: RouteRequest) -> list[int]:
    return [index for index, group in enumerate(groups) if group.healthy and group.key not in request.avoid]


def _load_of(group: GroupView) -> tuple[int, int, float]:
    """Tokens ahead, then sequences that share the batch, then how full the cache is."""
    used = 1.0 - group.num_free_blocks / group.num_blocks if group.num_blocks else 0.0
    return (group.outstanding_tokens + group.num_waiting_tokens, group.num_running + group.num_waiting, used)
