"""Routing policies."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from scheduler.affinity import PrefixMemory
from scheduler.routing import (
    POLICIES,
    EvenSteps,
    GroupView,
    LeastLoaded,
    PowerOfTwoChoices,
    PrefixAffinity,
    RoundRobin,
    RouteRequest,
    group_imbalance,
    route_prefix,
)

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
        ({"num_waiting_tokens": 100, "num_waiting": 2}, {"outstanding_tokens": 60, "num_running": 1}),
        ({"num_running": 3}, {"num_running": 2, "num_free_blocks": 0}),
        ({"num_free_blocks": 2}, {"num_free_blocks": 3}),
    ],
)
@pytest.mark.parametrize("name", ["least-tokens", "power-of-two", "prefix-affinity"])
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


def test_round_robin_goes_round() -> None:
    policy = RoundRobin()
    groups = [group("a", outstanding_tokens=99), group("b"), group("c", healthy=False), group("d")]
    assert [policy.choose(groups, REQUEST) for _ in range(6)] == [0, 1, 3] * 2


PROMPT = [index % 97 for index in range(640)]


def asking(token_ids: list[int], now_s: float = 0.0, tenant: str = "", **changes: Any) -> RouteRequest:
    prefix = route_prefix(token_ids, tenant)
    return RouteRequest(num_tokens=len(token_ids), max_tokens=10, prefix=prefix, now_s=now_s, **changes)


def affinity(**changes: Any) -> PrefixAffinity:
    return PrefixAffinity(LeastLoaded(), **changes)


def test_a_conversation_stays_where_it_is() -> None:
    policy = affinity()
    groups = [group("a"), group("b", outstanding_tokens=5)]
    assert policy.choose(groups, asking(PROMPT)) == 0
    busier = [group("a", outstanding_tokens=2000), group("b", outstanding_tokens=5)]
    assert policy.choose(busier, asking([*PROMPT, 1, 2, 3])) == 0
    assert policy.choose(busier, asking([7, *PROMPT])) == 1
    assert policy.choose(busier, asking(PROMPT, tenant="another")) == 1


def test_until_its_group_is_saturated_and_then_it_stays_at_the_new_one_too() -> None:
    policy = affinity(patience=4.0)
    policy.choose([group("a"), group("b", outstanding_tokens=1)], asking(PROMPT))
    saturated = [group("a", outstanding_tokens=4 * 640 + 1), group("b")]
    assert policy.choose(saturated, asking(PROMPT)) == 1
    calm = [group("a", outstanding_tokens=100), group("b", outstanding_tokens=200)]
    assert policy.choose(calm, asking(PROMPT)) == 0, "both hold it now: the less busy one"
    assert policy.choose(calm, asking(PROMPT, avoid=frozenset({"a"}))) == 1


def test_a_short_common_beginning_draws_nobody_to_a_busy_group() -> None:
    policy = affinity(patience=4.0)
    policy.choose([group("a"), group("b", outstanding_tokens=1)], asking(PROMPT))
    groups = [group("a", outstanding_tokens=400), group("b")]
    assert policy.choose(groups, asking([*PROMPT[:64], *[5] * 200])) == 1
    assert policy.choose(groups, asking([*PROMPT[:128], *[5] * 200])) == 0


def test_a_group_that_is_gone_is_not_waited_for() -> None:
    policy = affinity()
    policy.choose([group("a"), group("b", outstanding_tokens=1)], asking(PROMPT))
    assert policy.choose([group("b"), group("c")], asking(PROMPT)) == 0
    assert policy.choose([group("a", healthy=False), group("c")], asking(PROMPT)) == 1


def test_what_was_sent_long_ago_is_not_expected_to_be_there() -> None:
    policy = affinity(ttl_s=60.0)
    groups = [group("a"), group("b", outstanding_tokens=1)]
    policy.choose(groups, asking(PROMPT, now_s=10.0))
    turned = [group("a", outstanding_tokens=1), group("b")]
    assert policy.choose(turned, asking(PROMPT, now_s=70.0)) == 0
    assert policy.choose(turned, asking(PROMPT, now_s=131.0)) == 1


def test_the_memory_is_bounded_and_forgets_long_beginnings_first() -> None:
    memory = PrefixMemory(max_entries=6, ttl_s=60.0)
    old, new = route_prefix([1] * 256), route_prefix([2] * 256)
    memory.sent(old, "a", 0.0)
    memory.sent(new, "b", 0.0)
    assert len(memory) == 6
    assert [list(memory.groups_of(beginning, 0.0)) for beginning in old] == [["a"], ["a"], [], []]
    assert [list(memory.groups_of(beginning, 0.0)) for beginning in new] == [["b"]] * 4
    for key in "cdefg":
        memory.sent(new, key, 0.0)
    assert list(memory.groups_of(new[0], 0.0)) == ["g", "f", "e", "d"]


def test_even_steps_fills_the_emptiest_engine_and_in_it_the_emptiest_group() -> None:
    def in_engine(engine: str, key: str, **changes: Any) -> GroupView:
        return GroupView(key=key, engine=engine, healthy=True, **changes)

    groups = [
        in_engine("x", "x0", num_running=10),
        in_engine("x", "x1", num_running=0),
        in_engine("y", "y0", num_running=2, num_outstanding=5),
        in_engine("y", "y1", num_running=3),
    ]
    assert EvenSteps().choose(groups, REQUEST) == 3
    assert group_imbalance(groups) == {"x": 2.0, "y": 5 * 2 / 8}
    assert group_imbalance([in_engine("x", "x0")]) == {"x": 1.0}


def test_even_steps_keeps_groups_even_whatever_comes_and_goes() -> None:
    rng = random.Random(3)
    running = [0] * 8
    for _ in range(400):
        groups = [group(str(index), num_running=num) for index, num in enumerate(running)]
        chosen = EvenSteps().choose(groups, REQUEST)
        assert chosen is not None
        running[chosen] += 1
        if rng.random() < 0.7 and any(running):
            running[rng.choice([index for index, num in enumerate(running) if num])] -= 1
    assert group_imbalance([group(str(i), num_running=num) for i, num in enumerate(running)])["e"] <= 1.3
