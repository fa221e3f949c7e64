"""Which ranks Ray must keep together."""

from __future__ import annotations

import pytest

from cluster.engine.bundles import bundle_ranks
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings


def settings(plan: ParallelPlan, device: str = "cpu", threads: int = 2) -> EngineSettings:
    return EngineSettings(
        engine="e",
        model_name="m",
        model_path="/m",
        plan=plan,
        dtype="float32",
        device=device,
        num_threads=threads,
        max_model_len=128,
    )


@pytest.mark.parametrize(
    ("plan", "device", "largest", "bundle", "count"),
    [
        (ParallelPlan(data=2), "cpu", 8, {"CPU": 2}, 2),
        (ParallelPlan(data=2, tensor=4), "cpu", 8, {"CPU": 8}, 2),
        (ParallelPlan(data=2, tensor=4), "cpu", 7, {"CPU": 2}, 8),
        (ParallelPlan(tensor=8), "cuda", 8, {"GPU": 8}, 1),
        (ParallelPlan(tensor=16), "cuda", 8, {"GPU": 1}, 16),
    ],
)
def test_tensor_groups_stay_together_where_a_node_has_room(
    plan: ParallelPlan, device: str, largest: float, bundle: dict[str, int], count: int
) -> None:
    bundles = bundle_ranks(settings(plan, device), largest)
    assert (bundles.bundle, bundles.count) == (bundle, count)
    held = [bundles.index(rank) for rank in range(plan.num_ranks)]
    assert held == sorted(held)
    assert set(held) == set(range(count))
    if bundles.ranks == plan.tensor:
        for rank in range(plan.num_ranks):
            assert bundles.index(rank) == bundles.index(rank - rank % plan.tensor)
