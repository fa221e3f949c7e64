"""What Prometheus is told of experts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from cluster.front_door.expert_metrics import ExpertMetrics
from protos.shoal.v1 import admin_pb2


def _scrape(metrics: ExpertMetrics) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_ranks_and_imbalance_of_the_engines_that_have_experts() -> None:
    metrics = ExpertMetrics("tiny")
    assert _scrape(metrics) == {}
    loaded = admin_pb2.EngineStatus(name="engine-0", expert_imbalance=1.5, expert_epoch=3)
    loaded.ranks.add(rank=0, expert_tokens=30)
    loaded.ranks.add(rank=1, expert_tokens=10)
    metrics.see([loaded, admin_pb2.EngineStatus(name="engine-1")])
    assert _scrape(metrics) == {
        'shoal_expert_tokens{engine="engine-0",model_name="tiny",rank="0"}': 30.0,
        'shoal_expert_tokens{engine="engine-0",model_name="tiny",rank="1"}': 10.0,
        'shoal_expert_imbalance{engine="engine-0",model_name="tiny"}': 1.5,
        'shoal_expert_moves_total{engine="engine-0",model_name="tiny"}': 3.0,
    }
    metrics.see([])
    assert _scrape(metrics) == {}
