"""Collectives between real processes: the sums, and which implementation made them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.collectives_process import HOST
from workers.parallel.build import is_built
from workers.parallel.groups import host_store
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

ROOT = Path(__file__).parents[2]
needs_shm = pytest.mark.skipif(not is_built(), reason="shared memory is not compiled")


def run(folder: Path, plan: ParallelPlan, generations: list[int], **fields: Any) -> list[list[dict[str, Any]]]:
    """What each rank found in each generation; the ranks of a tensor group have the same sums bit for bit."""
    settings = EngineSettings(
        engine="e0",
        model_name="none",
        model_path="",
        plan=plan,
        dtype="float32",
        device="cpu",
        max_model_len=64,
        step_timeout_s=30,
        **fields,
    )
    path = folder / "settings.json"
    path.write_text(json.dumps(dataclasses.asdict(settings)))
    store = host_store(HOST)
    command = [sys.executable, "-m", "tests.integration.collectives_process", str(path)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(store.port), *map(str, generations)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for rank in range(plan.num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    found = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    for group in range(0, plan.num_ranks, plan.tensor):
        for of_one_generation in zip(*found[group : group + plan.tensor], strict=True):
            assert len({one.pop("sums_of_fractions") for one in of_one_generation}) == 1
    return found


def check(found: dict[str, Any], kind: str, minimum: int = 100) -> None:
    assert found == {"kind": kind, "wrong_sums": [], "gathered": True, "minimum": minimum}


@needs_shm
def test_shared_memory_serves_the_first_generation_and_gloo_the_next(tmp_path: Path) -> None:
    for first, second in run(tmp_path, ParallelPlan(tensor=2), [1, 2], collectives="auto"):
        check(first, "deepspeed shared memory")
        check(second, "gloo (shared memory serves a process's first group only)")


def test_two_groups_of_two_keep_to_themselves(tmp_path: Path) -> None:
    found = run(tmp_path, ParallelPlan(data=2, tensor=2), [1], collectives="auto")
    for rank, (only,) in enumerate(found):
        check(only, only["kind"], minimum=100 if rank < 2 else 102)


def test_tensor_groups_of_several_stages_use_gloo(tmp_path: Path) -> None:
    found = run(tmp_path, ParallelPlan(pipeline=2, tensor=2), [1], collectives="auto")
    kind = "gloo (shared memory serves one tensor group alone)"
    for rank, (only,) in enumerate(found):
        check(only, kind, minimum=100 if rank < 2 else 102)


def test_more_ranks_than_cores_use_gloo(tmp_path: Path) -> None:
    found = run(tmp_path, ParallelPlan(tensor=2), [7], collectives="auto", num_threads=10_000)
    for (only,) in found:
        check(only, only["kind"])
        assert only["kind"].startswith(
            "gloo (20000 threads for" if is_built() else "gloo (shared memory is not compiled"
        )


@needs_shm
def test_what_is_demanded_and_impossible_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="collectives: shm is not possible: shared memory serves one tensor group"):
        run(tmp_path, ParallelPlan(pipeline=2, tensor=2), [1], collectives="shm")
