"""What Prometheus is told of engines and their regroups."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from cluster.engine.history import History, Occasion
from cluster.front_door.engine_metrics import EngineMetrics
from protos.shoal.v1 import admin_pb2


def test_ranks_generation_and_regroups_of_an_engine() -> None:
    history = History()
    for seconds in (0.4, 0.6, 2.5):
        history.regrouped(Occasion.LOST, "rank 1 died", seconds)
    history.regrouped(Occasion.RETURNED, "ranks 1 are back", 0.05)
    history.restarted("rank 3 died")
    engine = admin_pb2.EngineStatus(name="engine-0", state="ready", generation=7, num_ranks=4, joining_ranks=[1])
    for rank in (0, 2, 3):
        engine.ranks.add(rank=rank)
    history.tell(engine)
    assert (engine.num_regroups, engine.last_regroup_cause) == (4, "ranks 1 are back")
    metrics = EngineMetrics("tiny")
    registry = CollectorRegistry()
    registry.register(metrics)
    assert "engine-0" not in generate_latest(registry).decode()
    metrics.see([engine])
    lines = generate_latest(registry).decode().splitlines()
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    by = 'engine="engine-0",model_name="tiny"'
    assert {name: found[f"shoal_engine_{name}{{{by}}}"] for name in ("generation", "ready", "restarts_total")} == {
        "generation": 7,
        "ready": 1,
        "restarts_total": 1,
    }
    ranks = {what: found[f"shoal_engine_ranks_{what}{{{by}}}"] for what in ("wanted", "alive", "joining")}
    assert ranks == {"wanted": 4, "alive": 3, "joining": 1}
    of_lost = f'{by},occasion="lost"'
    label = 'engine="engine-0",le="{}",model_name="tiny",occasion="lost"'
    assert found[f"shoal_regroup_seconds_count{{{of_lost}}}"] == 3
    assert found[f"shoal_regroup_seconds_sum{{{of_lost}}}"] == 3.5
    buckets = [found[f"shoal_regroup_seconds_bucket{{{label.format(end)}}}"] for end in ("0.25", "0.5", "1.0", "3.0")]
    assert buckets == [0, 1, 2, 3]
    assert found[f'shoal_regroup_seconds_count{{{by},occasion="returned"}}'] == 1
    assert found[f'shoal_regroup_seconds_count{{{by},occasion="taken-over"}}'] == 0
