"""What scheduling itself costs: `python -m scheduler.simulator.overhead [--steps N]`.

Times `schedule` and `commit` of a batch that decodes, and nothing else: results are made beforehand. Blocks fill up and
are published on the way, as they are in service.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from scheduler.batcher import Batcher, BatcherSettings
from scheduler.plan import SequenceResult, StepResult
from scheduler.request import Request, SamplingParams
from scheduler.simulator.outcome import percentile
from scheduler.tenants import FairnessSettings

__all__ = ["Overhead", "measure"]

SIZES = {64: 0.3, 256: 1.0, 1024: 4.0}
"""Sequences that decode together, and the most milliseconds that a step of them should cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """Milliseconds of scheduling per step."""

    num_running: int
    median_ms: float
    p99_ms: float


def measure(num_running: int, num_steps: int, *, fairness: FairnessSettings | None = None) -> Overhead:
    settings = BatcherSettings(
        max_batch_size=num_running,
        max_batch_tokens=max(2048, num_running),
        max_model_len=4096 + num_steps,
        block_size=16,
        num_blocks=num_running * (num_steps // 16 + 16),
        max_waiting=num_running,
        fairness=fairness,
    )
    batcher = Batcher(settings, clock=time.perf_counter)
    for index in range(num_running):
        batcher.submit(
            Request(
                key=str(index),
                prompt_token_ids=tuple(range(index, index + 40 + index % 16)),
                sampling=SamplingParams(max_tokens=num_steps + 64, ignore_eos=True),
                arrival_s=time.perf_counter(),
                tenant=f"tenant{index % 8}",
            )
        )
    # As a rank does at its start: what lives long is not walked through between steps.
    gc.collect()
    gc.freeze()
    sampled, nothing = SequenceResult(7), SequenceResult()
    spent_ms: list[float] = []
    while len(spent_ms) < num_steps:
        began_s = time.perf_counter()
        plan = batcher.schedule()
        scheduled_s = time.perf_counter()
        assert plan is not None
        result = StepResult(tuple(sampled if one.samples else nothing for one in plan.sequences))
        committing_s = time.perf_counter()
        batcher.commit(plan, result)
        if plan.num_tokens == num_running:
            spent_ms.append(1e3 * (time.perf_counter() - committing_s + scheduled_s - began_s))
    return Overhead(num_running=num_running, median_ms=percentile(spent_ms, 0.5), p99_ms=percentile(spent_ms, 0.99))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scheduler.simulator.overhead")
    parser.add_argument("--steps", type=int, default=300, help="steps to time for each size")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    found = {}
    sys.stdout.write("running  median ms  p99 ms  goal ms  with tenants: median ms\n")
    for size, goal_ms in SIZES.items():
        plain, fair = measure(size, options.steps), measure(size, options.steps, fairness=FairnessSettings())
        found[size] = {"plain": asdict(plain), "tenants": asdict(fair), "goal_ms": goal_ms}
        sys.stdout.write(
            f"{size:7d}  {plain.median_ms:9.3f}  {plain.p99_ms:6.3f}  {goal_ms:7.1f}  {fair.median_ms:23.3f}\n"
        )
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
