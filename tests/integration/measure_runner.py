"""A runner against transformers' `generate` (workers/kernels/README.md): `python -m tests.integration.measure_runner`.

A model of SmolLM2-135M's shape, or with `--shape v3-0.7b` a mixture of experts, with random weights in bf16; greedy,
nothing stops early. The two take turns in one process, and the best turn of each counts. With one thread (the default)
it is processor time that is compared, so that other work on the machine hardly shows; `--threads 2` compares elapsed
time and wants an idle machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.integration.measure_deterministic import SHAPE
from tests.unit.workers.ranks import Sequence_, settings_for, step_of
from workers.assemble import assemble
from workers.parallel.collectives import SingleRank
from workers.parallel.plan import ParallelPlan
from workers.runner import Runner
from workers.weights.random_checkpoint import SHAPES, random_checkpoint

__all__ = ["BLOCK_SIZE", "TURNS", "run_ours"]

BLOCK_SIZE, TURNS = 16, 3
# name, sequences, prompt tokens, tokens generated of each
CASES = (("one sequence", 1, 128, 64), ("a long prompt", 1, 1024, 1), ("16 sequences", 16, 128, 128))
Clock = Callable[[], float]


def _prompts(count: int, length: int) -> list[list[int]]:
    ids = torch.randint(3, 32000, (count, length), generator=torch.Generator().manual_seed(1))
    return [[int(token_id) for token_id in row] for row in ids]


def run_ours(runner: Runner, clock: Clock, count: int, prompt: int, output: int) -> tuple[float, float]:
    """Seconds to the first tokens, and from there to the last."""
    blocks = -(-(prompt + output) // BLOCK_SIZE)
    sequences = [
        Sequence_(ids, list(range(index * blocks, (index + 1) * blocks)))
        for index, ids in enumerate(_prompts(count, prompt))
    ]
    marks = [clock()]
    for step in range(output):
        num_tokens = 1 if step else prompt
        logits = runner.forward(step_of([(sequence, num_tokens, 1) for sequence in sequences]))
        assert logits is not None
        for sequence, token_id in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            sequence.num_computed += num_tokens
            sequence.token_ids.append(token_id)
        if not step:
            marks.append(clock())
    return marks[1] - marks[0], clock() - marks[1]


def _theirs(model: object, clock: Clock, count: int, prompt: int, output: int) -> tuple[float, float]:
    ids = torch.tensor(_prompts(count, prompt))

    def seconds(tokens: int) -> float:
        started_s = clock()
        model.generate(  # type: ignore[attr-defined]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
        return clock() - started_s

    first_s = seconds(1)
    return first_s, seconds(output) - first_s if output > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of random_checkpoint's")
    options = parser.parse_args()
    threads = options.threads
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_checkpoint(folder, SHAPES[options.shape] if options.shape else SHAPE, dtype="bfloat16")
        settings = settings_for(
            folder,
            dtype="bfloat16",
            max_model_len=2048,
            block_size=BLOCK_SIZE,
            cache_bytes=1 << 29,
            num_threads=threads,
        )
        runner = assemble(settings, ParallelPlan().place(0), SingleRank())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    print(f"{runner.report.kernels}, {threads} thread(s)")
    for title, count, prompt, output in CASES:
        turns = [
            (run_ours(runner, clock, count, prompt, output), _theirs(model, clock, count, prompt, output))
            for _ in range(TURNS + 1)
        ][1:]
        ours, theirs = ([min(turn[side][part] for turn in turns) for part in (0, 1)] for side in (0, 1))
        print(f"{title}: prefill {count * prompt / ours[0]:.0f} tokens/s, {theirs[0] / ours[0]:.2f} times", end="")
        if output > 1:
            rate = count * (output - 1) / ours[1]
            print(f"; decode {rate:.1f} tokens/s, {theirs[1] / ours[1]:.2f} times", end="")
            print(f"; together {sum(theirs) / sum(ours):.2f} times", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
