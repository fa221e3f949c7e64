"""What a front door knows of DP groups when it sends a sequence to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["GroupView", "RouteRequest", "RoutingPolicy", "fit", "load_of", "tokens_ahead"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupView:
    """A DP group as one front door sees it.

    The group itself reports the first block of numbers, once per step and for all front doors. `outstanding_tokens`
    and `num_outstanding` are this front door's own count of what it has sent there and not yet got back: they never
    lag. `max_batch_tokens` is the most that a step there holds; 0 where that is not known.
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
    num_outstanding: int = 0
    max_batch_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteRequest:
    """What a policy may know of a sequence. Groups in `avoid` have just failed it, or refused it.

    `prefix` are the hashes of its prompt's beginnings (`scheduler.affinity.route_prefix`), the shortest first; `now_s`
    is the front door's clock.
    """

    num_tokens: int
    max_tokens: int
    avoid: frozenset[str] = frozenset()
    prefix: Sequence[bytes] = ()
    now_s: float = 0.0


class RoutingPolicy(Protocol):
    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        """The index of the group to use; None where no group is fit."""
        ...


def fit(groups: Sequence[GroupView], request: RouteRequest) -> list[int]:
    """The groups that may be chosen."""
    return [index for index, group in enumerate(groups) if group.healthy and group.key not in request.avoid]


def tokens_ahead(group: GroupView) -> int:
    return group.outstanding_tokens + group.num_waiting_tokens


def load_of(group: GroupView) -> tuple[int, int, float]:
    """Tokens ahead, then sequences that share the batch, then how full the cache is."""
    used = 1.0 - group.num_free_blocks / group.num_blocks if group.num_blocks else 0.0
    return (tokens_ahead(group), group.num_running + group.num_waiting, used)
