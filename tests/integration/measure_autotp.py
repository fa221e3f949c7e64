"""What running a model through transformers costs (workers/autotp/README.md).

    python -m tests.integration.measure_autotp

The same random weights of SmolLM2-135M's shape in bf16, once as a llama, which is native, and once as a mistral without
a window, which is not. The two take turns in one process and one thread; processor time, the best turn of each.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from tests.integration.measure_deterministic import SHAPE
from tests.integration.measure_runner import BLOCK_SIZE, TURNS, run_ours
from tests.unit.workers.ranks import settings_for
from workers.assemble import assemble
from workers.parallel.collectives import SingleRank
from workers.parallel.plan import ParallelPlan
from workers.runner import Runner
from workers.weights.random_checkpoint import random_checkpoint

CASES = (("one sequence", 1, 128, 32), ("a long prompt", 1, 1024, 1))


def _runner(folder: Path) -> Runner:
    settings = settings_for(
        folder, dtype="bfloat16", max_model_len=2048, block_size=BLOCK_SIZE, cache_bytes=1 << 29, num_threads=1
    )
    return assemble(settings, ParallelPlan().place(0), SingleRank())


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_checkpoint(folder, SHAPE, dtype="bfloat16")
        native = _runner(folder)
        raw = json.loads((folder / "config.json").read_text())
        raw |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        (folder / "config.json").write_text(json.dumps(raw))
        adopted = _runner(folder)
    print(f"{native.report.kernels}; {adopted.report.kernels}")
    for title, count, prompt, output in CASES:
        turns = [
            [run_ours(runner, time.thread_time, count, prompt, output) for runner in (native, adopted)]
            for _ in range(TURNS + 1)
        ][1:]
        ours, theirs = ([min(turn[side][part] for turn in turns) for part in (0, 1)] for side in (0, 1))
        print(
            f"{title}: prefill {count * prompt / theirs[0]:.0f} tokens/s, {ours[0] / theirs[0]:.2f} of native", end=""
        )
        if output > 1:
            rate = count * (output - 1) / theirs[1]
            print(f"; decode {rate:.1f} tokens/s, {ours[1] / theirs[1]:.2f} of native", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
