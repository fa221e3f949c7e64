"""Where each routed expert lives: the placement of experts on the ranks of a stage, balanced by measured load.

A placement gives every rank the same number of slots; each slot holds one expert, and an expert with several slots is
redundant: its tokens are shared among them, and it survives the loss of a rank. The algorithm follows the idea of
DeepSeek's EPLB (DeepSeek-V3, arXiv 2412.19437, section 3.4): replicate what is loaded most, then pack the replicas so
that ranks carry equal load, with the ranks of a host kept together where groups of experts allow it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ExpertPlacement",
    "balanced",
    "contiguous",
    "imbalance",
    "rank_loads",
    "settled",
    "step_imbalance",
    "striped",
]


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """`slots[rank]` are the expert ids that the rank holds, in the order of its weights.

    Raises ValueError where an expert lives nowhere, a rank holds one twice, or ranks differ in their slots by more
    than the unavoidable one.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        held = [expert for rank in self.slots for expert in rank]
        missing = set(range(self.num_experts)) - set(held)
        if missing:
            raise ValueError(f"experts {sorted(missing)} live on no rank")
        if any(not 0 <= expert < self.num_experts for expert in held):
            raise ValueError(f"expert ids must be below {self.num_experts}")
        for rank, experts in enumerate(self.slots):
            if len(set(experts)) < len(experts):
                raise ValueError(f"rank {rank} holds an expert twice: {experts}")
        sizes = {len(rank) for rank in self.slots}
        if max(sizes) - min(sizes) > 1:
            raise ValueError(f"ranks hold between {min(sizes)} and {max(sizes)} experts; they may differ by one")

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    @property
    def slots_per_rank(self) -> int:
        """Slots of the rank with the most; a slot's physical id is `rank * slots_per_rank + slot`."""
        return max(map(len, self.slots))

    def replicas(self) -> list[list[int]]:
        """For each expert the physical ids of its slots, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.slots):
            for slot, expert in enumerate(experts):
                found[expert].append(rank * self.slots_per_rank + slot)
        return found


def contiguous(num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Each expert once, neighbours together."""
    bounds = [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]
    return ExpertPlacement(num_experts, tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds)))


def striped(num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Each expert once, neighbours apart: a gate that keeps to some groups of neighbours still asks every rank."""
    return ExpertPlacement(num_experts, tuple(tuple(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)))


def balanced(loads: Sequence[float], num_ranks: int, *, redundant: int = 0, num_hosts: int = 1) -> ExpertPlacement:
    """A placement of `len(loads) + redundant` slots that evens out `loads`, the tokens each expert was given.

    With several hosts, experts are first packed onto hosts and then, within each, onto its ranks, so that traffic
    between hosts does not grow with the number of ranks. Raises ValueError where the slots cannot be spread evenly,
    or an expert would need more replicas than there are ranks.
    """
    num_experts = len(loads)
    num_slots = num_experts + redundant
    if num_ranks % num_hosts:
        raise ValueError(f"{num_ranks} ranks cannot be spread evenly over {num_hosts} hosts")
    if redundant and num_slots % num_ranks:
        raise ValueError(f"{num_experts} experts and {redundant} redundant ones do not divide by {num_ranks} ranks")
    if num_slots > num_experts * num_ranks:
        raise ValueError(f"{redundant} redundant experts are more than {num_ranks} ranks can hold once each")
    copies = _replicate(loads, num_slots, limit=num_ranks)
    share = [load / count for load, count in zip(loads, copies, strict=True)]
    replicas = [expert for expert, count in enumerate(copies) for _ in range(count)]
    per_host = num_ranks // num_hosts
    hosts = _pack(replicas, share, num_hosts, most_per_bin=per_host)
    ranks = [rank for host in hosts for rank in _pack(host, share, per_host, most_per_bin=1)]
    return ExpertPlacement(num_experts, tuple(tuple(sorted(rank)) for rank in ranks))


def rank_loads(placement: ExpertPlacement, loads: Sequence[float]) -> list[float]:
    """What each rank carries when an expert's tokens are shared equally among its slots."""
    replicas = placement.replicas()
    return [sum(loads[expert] / len(replicas[expert]) for expert in rank) for rank in placement.slots]


def imbalance(carried: Sequence[float]) -> float:
    """The most loaded rank over the mean: 1 is even; the slowest rank sets the step. 1 where nothing is carried."""
    total = sum(carried)
    return max(carried) * len(carried) / total if total else 1.0


def step_imbalance(carried_by_layer: Sequence[Sequence[float]]) -> float:
    """The same of a whole step: in every layer all wait for that layer's most loaded rank."""
    total = sum(sum(carried) for carried in carried_by_layer)
    if not total:
        return 1.0
    return sum(max(carried) * len(carried) for carried in carried_by_layer) / total


def settled(wanted: ExpertPlacement, current: ExpertPlacement, *, num_hosts: int = 1) -> ExpertPlacement:
    """`wanted` with its ranks renumbered within each host, and its slots within each rank, so that few experts move.

    Who shares a rank with whom does not change, so neither does the balance.
    """
    per_host = wanted.num_ranks // num_hosts
    slots: list[tuple[int, ...]] = []
    for start in range(0, wanted.num_ranks, per_host):
        ranks = range(start, start + per_host)
        overlaps = sorted(
            ((-len(set(wanted.slots[a]) & set(current.slots[b])), a, b) for a in ranks for b in ranks),
        )
        home: dict[int, int] = {}
        for _, a, b in overlaps:
            if a not in home.values() and b not in home:
                home[b] = a
        slots += [_in_old_slots(wanted.slots[home[rank]], current.slots[rank]) for rank in ranks]
    return ExpertPlacement(wanted.num_experts, tuple(slots))


def _in_old_slots(experts: tuple[int, ...], old: tuple[int, ...]) -> tuple[int, ...]:
    kept = {slot: expert for slot, expert in enumerate(old[: len(experts)]) if expert in experts}
    others = iter(sorted(set(experts) - set(kept.values())))
    return tuple(kept[slot] if slot in kept else next(others) for slot in range(len(experts)))


def _replicate(loads: Sequence[float], num_slots: int, *, limit: int) -> list[int]:
    """Copies per expert: each further slot goes to whichever expert then carries most per copy."""
    copies = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_slots - len(loads)):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < limit:
            heapq.heappush(heap, (-loads[expert] / copies[expert], expert))
    return copies


def _pack(replicas: list[int], share: Sequence[float], num_bins: int, *, most_per_bin: int) -> list[list[int]]:
    """Bins of sizes that differ by at most one, filled heaviest first, always the lightest bin that may take it.

    A bin takes at most `most_per_bin` copies of an expert. Where the greedy order runs into a corner, a copy trades
    places with one that fits.
    """
    sizes = [len(replicas) * (n + 1) // num_bins - len(replicas) * n // num_bins for n in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    carried = [0.0] * num_bins
    for expert in sorted(replicas, key=lambda e: (-share[e], e)):
        open_bins = [n for n in range(num_bins) if len(bins[n]) < sizes[n]]
        fitting = [n for n in open_bins if bins[n].count(expert) < most_per_bin]
        if fitting:
            chosen = min(fitting, key=lambda n: (carried[n], n))
        else:
            chosen = _make_place(bins, carried, share, expert, open_bins[0], most_per_bin)
        bins[chosen].append(expert)
        carried[chosen] += share[expert]
    return bins


def _make_place(
    bins: list[list[int]], carried: list[float], share: Sequence[float], expert: int, full: int, most_per_bin: int
) -> int:
    """Frees a place for `expert` in another bin by moving one of its copies into `full`; returns that bin."""
    for n, held in enumerate(bins):
        if n == full or held.count(expert) >= most_per_bin:
            continue
        for other in held:
            if bins[full].count(other) < most_per_bin:
                held.remove(other)
                bins[full].append(other)
                carried[n] -= share[other]
                carried[full] += share[other]
                return n
    raise ValueError(f"no rank can take another copy of expert {expert}")
