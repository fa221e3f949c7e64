"""Placements among survivors: everything lives somewhere, and little is read."""

from __future__ import annotations

from random import Random

import pytest

from scheduler.experts import ExpertPlacement, balanced, contiguous
from scheduler.experts_regroup import regrouped


def _read(before: list[tuple[int, ...]], after: ExpertPlacement) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before, after.slots, strict=True))


def test_what_only_the_lost_rank_held_goes_to_the_survivors_and_nothing_else_moves() -> None:
    held = list(contiguous(8, 4).slots)
    del held[2]
    found = regrouped(held, 8, num_slots=8)
    assert found.slots == ((0, 1, 4), (2, 3, 5), (6, 7))
    assert _read(held, found) == 2


def test_a_rank_that_comes_back_takes_its_experts_and_nothing_is_read() -> None:
    before = [(0, 1, 4), (2, 3, 5), (4, 5), (6, 7)]
    found = regrouped(before, 8, num_slots=8)
    assert found == contiguous(8, 4)


def test_redundant_experts_cover_a_loss_without_reading() -> None:
    placement = balanced([1.0] * 8, 4, redundant=8)
    for lost in range(4):
        held = [slots for rank, slots in enumerate(placement.slots) if rank != lost]
        missing = set(range(8)) - {expert for slots in held for expert in slots}
        assert _read(held, regrouped(held, 8, num_slots=16)) == len(missing)


@pytest.mark.parametrize("seed", range(200))
def test_any_history_of_losses_and_returns(seed: int) -> None:
    random = Random(seed)
    num_experts, num_ranks = random.choice([8, 16, 24, 60]), random.randint(2, 8)
    redundant = random.choice([0, num_ranks])
    if (num_experts + redundant) % num_ranks:
        redundant = 0
    first = balanced([1.0] * num_experts, num_ranks, redundant=redundant)
    living = dict(enumerate(first.slots))
    for _ in range(10):
        if len(living) > 1 and random.random() < 0.6:
            for lost in random.sample(sorted(living), random.randint(1, len(living) - 1)):
                del living[lost]
        else:
            for rank in set(range(num_ranks)) - living.keys():
                if random.random() < 0.7:
                    living[rank] = first.slots[rank]
        ranks = sorted(living)
        held = [living[rank] for rank in ranks]
        found = regrouped(held, num_experts, num_slots=num_experts + redundant)
        assert found.num_ranks == len(ranks)
        assert sum(map(len, found.slots)) <= max(num_experts + redundant, num_experts)
        # Slots that a rank keeps stay in their order, so nothing but what is new is built.
        living = dict(zip(ranks, found.slots, strict=True))
    everybody = [living.get(rank, first.slots[rank]) for rank in range(num_ranks)]
    assert regrouped(everybody, num_experts, num_slots=num_experts + redundant).num_ranks == num_ranks
