"""A histogram that costs one bisection per value: it is fed once per token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily

__all__ = ["Distribution"]


class Distribution:
    """Counts per bucket, and the sum. `bounds` are the buckets' upper ends, rising."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        assert list(bounds) == sorted(set(bounds))
        self.bounds = tuple(bounds)
        self.total = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def family(self, name: str, documentation: str, labels: dict[str, str]) -> HistogramMetricFamily:
        """In Prometheus' form, under any name."""
        family = HistogramMetricFamily(name, documentation, labels=list(labels))
        ends = [*map(str, self.bounds), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        family.add_metric(list(labels.values()), buckets, self.total)
        return family
