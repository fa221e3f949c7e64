"""How evenly the engines' routed experts are loaded, as their leaders last said.

Every front door tells it of all engines: take the maximum over front doors, not the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from protos.shoal.v1 import admin_pb2

__all__ = ["ExpertMetrics"]


class ExpertMetrics:
    """A Prometheus collector; `see` replaces what it tells."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._engines: tuple[admin_pb2.EngineStatus, ...] = ()

    def see(self, engines: Iterable[admin_pb2.EngineStatus]) -> None:
        """Every engine's newest status; those without experts that can move are left out."""
        self._engines = tuple(engine for engine in engines if engine.expert_imbalance)

    def collect(self) -> Iterator[Metric]:
        by_engine = ["model_name", "engine"]
        tokens = GaugeMetricFamily(
            "shoal_expert_tokens",
            "Recent expert choices that a rank serves; older ones fade.",
            labels=[*by_engine, "rank"],
        )
        imbalance = GaugeMetricFamily(
            "shoal_expert_imbalance",
            "A step's wait for the ranks with the most loaded experts over that for even ones; 1 is even.",
            labels=by_engine,
        )
        moves = CounterMetricFamily("shoal_expert_moves", "How often experts have changed places.", labels=by_engine)
        for engine in self._engines:
            labels = [self._model_name, engine.name]
            imbalance.add_metric(labels, engine.expert_imbalance)
            moves.add_metric(labels, engine.expert_epoch)
            for rank in engine.ranks:
                tokens.add_metric([*labels, str(rank.rank)], rank.expert_tokens)
        yield from (tokens, imbalance, moves)
