"""Expert placement: every invariant over random loads, and balance against doing nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.experts import (
    ExpertPlacement,
    balanced,
    contiguous,
    imbalance,
    rank_loads,
    settled,
    step_imbalance,
    striped,
)


@given(
    st.integers(1, 4).flatmap(
        lambda hosts: st.tuples(
            st.just(hosts),
            st.integers(1, 4).map(lambda per_host: hosts * per_host),
            st.lists(st.floats(0, 1e6), min_size=16, max_size=48),
            st.integers(0, 8),
        )
    )
)
@settings(deadline=None, max_examples=300)
def test_every_expert_lives_somewhere_once_per_rank(case: tuple[int, int, list[float], int]) -> None:
    hosts, ranks, loads, extra = case
    redundant = -len(loads) % ranks + extra * ranks if extra else 0
    if len(loads) + redundant > len(loads) * ranks:
        return
    placement = balanced(loads, ranks, redundant=redundant, num_hosts=hosts)
    assert sum(map(len, placement.slots)) == len(loads) + redundant
    assert sum(rank_loads(placement, loads)) == pytest.approx(sum(loads))
    for expert, physical in enumerate(placement.replicas()):
        assert physical
        for one in physical:
            rank, slot = divmod(one, placement.slots_per_rank)
            assert placement.slots[rank][slot] == expert


def test_balance_beats_neighbours_together_on_a_skewed_load() -> None:
    loads = [1000.0 / (expert + 1) for expert in range(64)]
    before = imbalance(rank_loads(contiguous(64, 8), loads))
    without_copies = imbalance(rank_loads(balanced(loads, 8), loads))
    with_copies = imbalance(rank_loads(balanced(loads, 8, redundant=16), loads))
    assert before > 4
    assert without_copies < before / 2
    assert with_copies < 1.05


def test_stripes_share_out_every_group_of_neighbours() -> None:
    placement = striped(10, 4)
    assert placement.slots == ((0, 4, 8), (1, 5, 9), (2, 6), (3, 7))


def test_redundant_copies_go_to_the_loaded() -> None:
    placement = balanced([100.0, 1.0, 1.0, 1.0, 1.0, 1.0], 4, redundant=2)
    copies = [len(physical) for physical in placement.replicas()]
    assert copies[0] == 3
    assert sum(copies) == 8


@pytest.mark.parametrize(
    ("slots", "word"),
    [(((0, 1), (2,)), "no rank"), (((0, 0), (1, 2), (3,)), "twice"), (((0, 1, 2), (3,)), "differ")],
)
def test_a_wrong_placement_is_refused(slots: tuple[tuple[int, ...], ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ExpertPlacement(4, slots)


@pytest.mark.parametrize(("ranks", "redundant", "hosts"), [(4, 3, 1), (6, 0, 4), (2, 20, 1)])
def test_what_cannot_be_spread_is_refused(ranks: int, redundant: int, hosts: int) -> None:
    with pytest.raises(ValueError, match=r"experts|hosts"):
        balanced([1.0] * 8, ranks, redundant=redundant, num_hosts=hosts)


@given(st.randoms(use_true_random=False), st.sampled_from([(4, 1), (4, 2), (8, 4)]))
@settings(deadline=None, max_examples=100)
def test_settling_moves_few_and_keeps_the_balance(random: random.Random, shape: tuple[int, int]) -> None:
    ranks, hosts = shape
    loads = [random.expovariate(1.0) for _ in range(24)]
    current = balanced([random.expovariate(1.0) for _ in range(24)], ranks, redundant=8, num_hosts=hosts)
    wanted = balanced(loads, ranks, redundant=8, num_hosts=hosts)
    found = settled(wanted, current, num_hosts=hosts)
    per_host = ranks // hosts
    for start in range(0, ranks, per_host):
        host = slice(start, start + per_host)
        assert sorted(map(sorted, found.slots[host])) == sorted(map(sorted, wanted.slots[host]))
    for new, old in zip(found.slots, current.slots, strict=True):
        stay = set(new) & set(old)
        assert [e for e in new if e in stay and new.index(e) == old.index(e)] == [e for e in new if e in stay]
    assert settled(current, current, num_hosts=hosts) == current


def test_a_step_waits_for_the_most_loaded_rank_of_every_layer() -> None:
    assert step_imbalance([[3.0, 1.0], [1.0, 3.0]]) == 1.5
    assert imbalance([4.0, 4.0]) == 1.0
    assert step_imbalance([[0.0, 0.0]]) == 1.0
