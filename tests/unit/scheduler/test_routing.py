"""Routing policies."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from scheduler.routing import POLICIES, GroupView, LeastLoaded, PowerOfTwoChoices, RouteRequest

REQUEST = RouteRequest(num_tokens=10, max_tokens=100)


def group(key: str, **changes: Any) -> GroupView:
    values: dict[str, Any] = {"healthy": True, "num_free_blocks": 8, "num_blocks": 8} | changes
    return GroupView(key=key, engine="e", **values)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_only_healthy_groups_that_are_not_avoided_are_chosen(name: str) -> None:
    policy = POLICIES[name](random.Random(1))
    groups = [group("a", healthy=False), group("b"), group("c", outstanding_tokens=9)]
    avoiding = RouteRequest(num_tokens=10, max_tokens=100, avoid=frozenset({"b"}))
    for _ in range(20):
        assert policy.choose(groups, avoiding) == 2
        assert policy.choose(groups[:2], REQUEST) == 1
        assert policy.choose(groups[:2], avoiding) is None
        assert policy.choose([], REQUEST) is None


@pytest.mark.parametrize(
    ("busy", "idle"),
    [
        ({"outstanding_tokens": 5}, {"outstanding_tokens": 4, "num_running": 9}),
        ({"num_waiting_tokens": 100}, {"outstanding_tokens": 60}),
        ({"num_running": 3}, {"num_running": 2, "num_free_blocks": 0}),
        ({"num_free_blocks": 2}, {"num_free_blocks": 3}),
    ],
)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_of_two_groups_the_less_loaded_is_chosen(name: str, busy: dict[str, int], idle: dict[str, int]) -> None:
    policy = POLICIES[name](random.Random(1))
    for _ in range(20):
        assert policy.choose([group("a", **busy), group("b", **idle)], REQUEST) == 1
        assert policy.choose([group("b", **idle), group("a", **busy)], REQUEST) == 0


def test_least_loaded_takes_the_best_of_all_and_the_first_of_equals() -> None:
    groups = [group(str(index), outstanding_tokens=tokens) for index, tokens in enumerate([5, 3, 4, 3])]
    assert LeastLoaded().choose(groups, REQUEST) == 1


def test_power_of_two_does_not_herd_on_old_news() -> None:
    """A hundred requests before the next report: the best group gets its share, not all, and the worst gets none."""
    policy = PowerOfTwoChoices(random.Random(7))
    groups = [group(str(index), num_waiting_tokens=index) for index in range(8)]
    chosen = Counter(policy.choose(groups, REQUEST) for _ in range(400))
    assert chosen[7] == 0
    assert 60 <= chosen[0] <= 140
    assert set(chosen) >= {0, 1, 2, 3, 4, 5}


def test_power_of_two_repeats_with_its_seed() -> None:
    groups = [group(str(index)) for index in range(8)]
    first, second = PowerOfTwoChoices(random.Random(7)), PowerOfTwoChoices(random.Random(7))
    assert [first.choose(groups, REQUEST) for _ in range(50)] == [second.choose(groups, REQUEST) for _ in range(50)]
