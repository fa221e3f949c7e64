"""Cuts a row of costs into runs of neighbours that are as even as can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import inf

__all__ = ["even_runs"]


@lru_cache(maxsize=256)
def even_runs(costs: Sequence[int], num_runs: int) -> tuple[range, ...]:
    """Runs with the least sum of squares, which is least for even ones; each has at least one member.

    `costs` must be hashable.
    """
    assert 1 <= num_runs <= len(costs)
    sums = [0, *accumulate(costs)]
    count = len(costs)
    best: list[float] = [0.0, *[inf] * count]  # of the first so many, in as many runs as were gone through
    cuts: list[list[int]] = []
    for _ in range(num_runs):
        cut = [0] * (count + 1)
        following: list[float] = [inf] * (count + 1)
        for stop in range(1, count + 1):
            found = min((best[start] + float(sums[stop] - sums[start]) ** 2, start) for start in range(stop))
            following[stop], cut[stop] = found
        best = following
        cuts.append(cut)
    runs: list[range] = []
    stop = count
    for cut in reversed(cuts):
        runs.append(range(cut[stop], stop))
        stop = cut[stop]
    return tuple(reversed(runs))
