"""A trace on steps as long as measured ones: `python -m scheduler.simulator.replay TRACE --steps FOLDER`.

TRACE has JSON lines (`scheduler.simulator.trace.read`); FOLDER holds what an engine wrote there because of
`scheduling.record_steps`. Says how well the step times fit, and what the trace would have come to.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scheduler.batcher import BatcherSettings
from scheduler.routing import POLICIES
from scheduler.simulator.outcome import Report, percentile
from scheduler.simulator.simulation import simulate
from scheduler.simulator.step_time import Features, StepTime
from scheduler.simulator.trace import read

__all__ = ["fit", "main", "read_steps"]

_OUTLIER = 4.0

Step = tuple[Features, float]


def read_steps(lines: Iterable[str]) -> list[Step]:
    """Features and seconds. Raises ValueError naming the line."""
    steps: list[Step] = []
    for number, line in enumerate(lines, 1):
        try:
            _, (one, prefill, decodes, pairs), seconds = json.loads(line)
            steps.append(((float(one), float(prefill), float(decodes), float(pairs)), float(seconds)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"line {number} of the steps: {error}") from error
    return [step for step in steps if step[1] > 0.0]


def fit(steps: list[Step]) -> tuple[StepTime, float]:
    """The step time, and the median of its relative errors. Raises ValueError where there are too few.

    Steps that took several times as long as they should were somebody else's doing and are left out. Together the
    others take as long as they did: errors of single steps must not add up.
    """
    first = StepTime.fit(steps)
    kept = [(x, y) for x, y in steps if y < _OUTLIER * first.seconds_of(x)] or steps
    shape = StepTime.fit(kept)
    scale = sum(y for _, y in kept) / sum(shape.seconds_of(x) for x, _ in kept)
    step_time = StepTime(**{part: scale * value for part, value in asdict(shape).items()})
    return step_time, percentile([abs(step_time.seconds_of(x) - y) / y for x, y in steps], 0.5)


def _summary(report: Report) -> dict[str, Any]:
    return {
        "ttft_s": [one.ttft_s for one in report.outcomes if one.ttft_s is not None],
        "e2e_s": [one.end_s - one.arrival.at_s for one in report.outcomes],
        "num_output_tokens": sum(len(one.token_times_s) for one in report.outcomes),
        "duration_s": report.end_s - min(one.arrival.at_s for one in report.outcomes),
        "num_steps": report.num_steps,
        "hit_rate": report.hit_rate,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scheduler.simulator.replay", description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--steps", type=Path, required=True, help="a folder of recorded steps")
    parser.add_argument("--settings", type=json.loads, default={}, help="BatcherSettings as a JSON object")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--routing", choices=sorted(POLICIES), default="prefix-affinity")
    parser.add_argument("--json", type=Path, help="write the outcome here")
    options = parser.parse_args(arguments)
    files = sorted(options.steps.glob("*.jsonl"))
    step_time, error = fit([step for file in files for step in read_steps(file.read_text().splitlines())])
    rng = random.Random(0)  # noqa: S311
    report = simulate(
        read(rng, options.trace.read_text().splitlines()),
        BatcherSettings(**(_SETTINGS | options.settings)),
        step_time=step_time,
        num_replicas=options.groups,
        policy=POLICIES[options.routing](rng),
    )
    summary = _summary(report) | {"step_time": asdict(step_time), "fit_error": error}
    rate = summary["num_output_tokens"] / summary["duration_s"]
    sys.stdout.write(f"{step_time}\nmedian error of a step {error:.1%}\n{rate:.1f} tokens/s, ")
    sys.stdout.write(f"TTFT p50 {report.ttft_s(0.5):.3f} s, p99 {report.ttft_s(0.99):.3f} s\n")
    if options.json:
        options.json.write_text(json.dumps(summary))


_SETTINGS = {
    "max_batch_size": 64,
    "max_batch_tokens": 2048,
    "max_model_len": 8192,
    "block_size": 16,
    "num_blocks": 4096,
}

if __name__ == "__main__":
    main()
