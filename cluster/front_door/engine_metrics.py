"""Who is there of the engines' ranks, and what regroups cost, as their leaders last said.

Every front door tells it of all engines: take the maximum over front doors, not the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from protos.shoal.v1 import admin_pb2

__all__ = ["EngineMetrics"]


class EngineMetrics:
    """A Prometheus collector; `see` replaces what it tells. Another leader counts from zero."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._engines: tuple[admin_pb2.EngineStatus, ...] = ()

    def see(self, engines: Iterable[admin_pb2.EngineStatus]) -> None:
        """Every engine's newest status."""
        self._engines = tuple(engines)

    def collect(self) -> Iterator[Metric]:
        by_engine = ["model_name", "engine"]
        ready = GaugeMetricFamily("shoal_engine_ready", "Whether an engine is ready.", labels=by_engine)
        generation = GaugeMetricFamily("shoal_engine_generation", "An engine's generation.", labels=by_engine)
        wanted = GaugeMetricFamily("shoal_engine_ranks_wanted", "Ranks of an engine's plan.", labels=by_engine)
        alive = GaugeMetricFamily("shoal_engine_ranks_alive", "Ranks that take part.", labels=by_engine)
        joining = GaugeMetricFamily(
            "shoal_engine_ranks_joining", "Ranks that load, to join the others.", labels=by_engine
        )
        restarts = CounterMetricFamily(
            "shoal_engine_restarts", "Starts of all ranks, because none could go on.", labels=by_engine
        )
        regroups = HistogramMetricFamily(
            "shoal_regroup_seconds", "How long no rank ran a step, by occasion.", labels=[*by_engine, "occasion"]
        )
        for engine in self._engines:
            labels = [self._model_name, engine.name]
            ready.add_metric(labels, float(engine.state == "ready"))
            generation.add_metric(labels, engine.generation)
            wanted.add_metric(labels, engine.num_ranks)
            alive.add_metric(labels, len(engine.ranks))
            joining.add_metric(labels, len(engine.joining_ranks))
            restarts.add_metric(labels, engine.num_restarts)
            for total in engine.regroups:
                ends = [*map(str, total.bounds_s), "+Inf"]
                buckets = list(zip(ends, accumulate(total.counts), strict=True))
                regroups.add_metric([*labels, total.occasion], buckets, total.seconds)
        yield from (ready, generation, wanted, alive, joining, restarts, regroups)
