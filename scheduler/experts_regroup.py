"""Where routed experts live after ranks were lost or came in: as few are read as possible, because everybody waits.

What a rank holds it keeps. Experts that nobody holds go to the ranks with the fewest; copies beyond what the plan asks
for are given up. Evening out the load is left to the balancer, which works while the engine serves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from scheduler.experts import ExpertPlacement

__all__ = ["regrouped"]


def regrouped(held: Sequence[Sequence[int]], num_experts: int, *, num_slots: int) -> ExpertPlacement:
    """A placement on the ranks that hold `held`, with `num_slots` slots in all where that leaves each expert one."""
    ranks = [list(experts) for experts in held]
    copies = Counter(expert for experts in ranks for expert in experts)
    for expert in range(num_experts):
        if not copies[expert]:
            min(ranks, key=len).append(expert)
            copies[expert] += 1
    while sum(map(len, ranks)) > max(num_slots, num_experts):
        _give_up_a_copy(ranks, copies)
    while max(map(len, ranks)) - min(map(len, ranks)) > 1:
        _even_out(ranks)
    return ExpertPlacement(num_experts, tuple(map(tuple, ranks)))


def _give_up_a_copy(ranks: list[list[int]], copies: Counter[int]) -> None:
    """The rank with the most experts gives up one that others hold too; some rank has one, for there are too many."""
    for rank in sorted(ranks, key=len, reverse=True):
        spare = max(rank, key=lambda expert: copies[expert], default=None)
        if spare is not None and copies[spare] > 1:
            rank.remove(spare)
            copies[spare] -= 1
            return
    raise AssertionError("no expert has a copy")


def _even_out(ranks: list[list[int]]) -> None:
    """One expert goes from the rank with the most to the one with the fewest, which must read it."""
    giver, taker = max(ranks, key=len), min(ranks, key=len)
    expert = next(expert for expert in reversed(giver) if expert not in taker)
    giver.remove(expert)
    taker.append(expert)
