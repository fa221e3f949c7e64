"""Who goes where ranks cannot reach each other: those that stay can, and no more go than must."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.partition import to_fence
from workers.parallel.plan import ParallelPlan

FOUR = ParallelPlan(data=4)


@pytest.mark.parametrize(
    ("cuts", "gone"),
    [
        ({}, []),
        ({1: {2}}, [2]),
        ({2: {1}}, [2]),
        ({0: {1}, 1: {0, 2, 3}, 2: {1}, 3: {1}}, [1]),
        ({0: {2, 3}, 1: {2, 3}, 2: {0, 1}, 3: {0, 1}}, [2, 3]),
        ({0: {1, 2, 3}}, [0]),
    ],
    ids=["whole", "one pair", "the same pair", "one against three", "two against two", "the first against the rest"],
)
def test_who_goes(cuts: dict[int, set[int]], gone: list[int]) -> None:
    assert sorted(to_fence(FOUR, cuts)) == gone


def test_a_group_goes_as_a_whole_and_the_reason_names_the_others() -> None:
    assert to_fence(ParallelPlan(data=2, tensor=2), {1: {2}}) == {
        2: "rank 2: its DP group cannot reach DP group 0",
        3: "rank 3: its DP group cannot reach DP group 0",
    }


pairs = st.sets(st.sampled_from(list(combinations(range(6), 2))))


@given(pairs, st.booleans())
def test_those_that_stay_reach_each_other(cut: set[tuple[int, int]], one_way: bool) -> None:
    cuts: dict[int, set[int]] = {}
    for left, right in cut:
        cuts.setdefault(left, set()).add(right)
        if not one_way:
            cuts.setdefault(right, set()).add(left)
    gone = set(to_fence(ParallelPlan(data=6), cuts))
    assert gone != set(range(6)), "somebody stays"
    assert all(left in gone or right in gone for left, right in cut)
