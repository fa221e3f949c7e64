"""What an engine's routed experts carry, and where they should live: the leader's view over all DP groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scheduler.experts import ExpertPlacement, balanced, imbalance, rank_loads, settled, step_imbalance
from workers.report import ExpertLoads

__all__ = ["ExpertWatch"]

# What was counted before counts this much less with every look.
_FADE = 0.9
# A layer moves if its most loaded rank would carry this much less, in parts of the mean.
_WORTH = 0.02


class ExpertWatch:
    """Recent loads from the groups' counters, which only rise; a counter that falls is of another life of its rank."""

    def __init__(self, epoch: int = 0) -> None:
        self._layers: tuple[int, ...] = ()
        self._stages: list[range] = []  # of a pipeline: which of the layers are theirs, by place in the list
        self._totals: list[list[int]] = []
        self._recent: list[list[float]] = []
        self._placements: list[ExpertPlacement] = []
        self.epoch = epoch

    def see(self, stages: Sequence[Sequence[ExpertLoads]]) -> None:
        """Of each stage of the pipeline one report of every DP group; none where it has no experts."""
        totals: list[list[int]] = []
        self._stages = []
        for reports in stages:
            by_layer = zip(*(report.counts for report in reports), strict=True)
            start = len(totals)
            totals += [[sum(counts) for counts in zip(*layer, strict=True)] for layer in by_layer]
            self._stages.append(range(start, len(totals)))
        firsts = [reports[0] for reports in stages if reports]
        layers = tuple(layer for first in firsts for layer in first.layers)
        slots = [places for first in firsts for places in first.slots]
        if self._layers != layers or any(
            new < old for a, b in zip(totals, self._totals, strict=True) for new, old in zip(a, b, strict=True)
        ):
            self._layers = layers
            self._totals = [[0] * len(counts) for counts in totals]
            self._recent = [[0.0] * len(counts) for counts in totals]
        self._recent = [
            [old * _FADE + new - before for old, new, before in zip(recent, now, then, strict=True)]
            for recent, now, then in zip(self._recent, totals, self._totals, strict=True)
        ]
        self._totals = totals
        self._placements = [ExpertPlacement(len(now), slots) for now, slots in zip(totals, slots, strict=True)]
        self.epoch = max([self.epoch, *(report.epoch for reports in stages for report in reports)])

    @property
    def stage_tokens(self) -> list[list[float]]:
        """Recent expert choices that each rank of each stage serves, over the stage's layers; empty before the first
        look, and where a stage has no experts."""
        carried = self._carried()
        return [[sum(layer) for layer in zip(*(carried[n] for n in stage), strict=True)] for stage in self._stages]

    @property
    def imbalance(self) -> float:
        """Of a step: how much longer all wait for the most loaded rank of each layer than for an even one."""
        return step_imbalance(self._carried())

    def wanted(self, num_hosts: Sequence[int]) -> Iterator[tuple[int, int, ExpertPlacement]]:
        """A stage, one of its layers that would gain by it, and a better placement. `num_hosts` are each stage's."""
        for stage, places in enumerate(self._stages):
            for place in places:
                found = _better(self._placements[place], self._recent[place], num_hosts[stage])
                if found is not None:
                    yield stage, self._layers[place], found

    def _carried(self) -> list[list[float]]:
        return [rank_loads(place, loads) for place, loads in zip(self._placements, self._recent, strict=True)]


def _better(current: ExpertPlacement, loads: Sequence[float], num_hosts: int) -> ExpertPlacement | None:
    """None where a layer with such loads would gain little."""
    # While ranks are missing their slots may not divide by those that are there.
    num_slots = sum(map(len, current.slots)) // current.num_ranks * current.num_ranks
    redundant = max(0, num_slots - current.num_experts)
    placement = balanced(loads, current.num_ranks, redundant=redundant, num_hosts=num_hosts)
    now, then = (imbalance(rank_loads(place, loads)) for place in (current, placement))
    return settled(placement, current, num_hosts=num_hosts) if now - then > _WORTH else None
