"""What deterministic inference costs (workers/kernels/README.md): `python -m tests.integration.measure_deterministic`.

A model of SmolLM2-135M's shape with random weights in bf16, on one thread; processor time, so that other work on the
machine hardly shows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.unit.workers.ranks import Sequence_, settings_for, step_of
from workers.assemble import assemble
from workers.parallel.collectives import SingleRank
from workers.parallel.plan import ParallelPlan
from workers.runner import Runner
from workers.weights.random_checkpoint import random_checkpoint

SHAPE: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
PREFILL, DECODE, BLOCK_SIZE = 1024, 32, 16


def _sequence(first_block: int, num_tokens: int) -> Sequence_:
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    return Sequence_([7] * num_tokens, list(range(first_block, first_block + num_blocks)))


def _step_s(runner: Runner, parts: Sequence[tuple[Sequence_, int]]) -> float:
    inputs = step_of([(sequence, count, 1) for sequence, count in parts])
    started_s = time.thread_time()
    runner.forward(inputs)
    taken_s = time.thread_time() - started_s
    for sequence, count in parts:
        sequence.num_computed += count
    return taken_s


def _measure(runner: Runner) -> dict[str, float]:
    """Milliseconds: the median of a few prefills, and of the steps of some decodes."""
    prefill, found = [], {}
    for _ in range(4):
        prefill.append(_step_s(runner, [(_sequence(0, PREFILL), PREFILL)]))
    found[f"prefill of {PREFILL}"] = 1000 * statistics.median(prefill[1:])
    for count in (1, 16):
        sequences = [_sequence(index * 16, 128 + DECODE) for index in range(count)]
        for sequence in sequences:
            _step_s(runner, [(sequence, 128)])
        steps = [_step_s(runner, [(sequence, 1) for sequence in sequences]) for _ in range(DECODE)]
        found[f"a step of {count} behind 128 tokens each"] = 1000 * statistics.median(steps)
    return found


def main() -> None:
    torch.set_num_threads(1)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(Path(folder), SHAPE, dtype="bfloat16")
        for deterministic in (False, True):
            settings = settings_for(
                Path(folder),
                dtype="bfloat16",
                deterministic=deterministic,
                max_model_len=PREFILL,
                block_size=BLOCK_SIZE,
                cache_bytes=1 << 28,
            )
            runner = assemble(settings, ParallelPlan().place(0), SingleRank())
            print(runner.report.kernels)
            measured.append(_measure(runner))
    fast, same = measured
    for name in fast:
        print(f"{name}: {fast[name]:.1f} ms, deterministic {same[name]:.1f} ms, {same[name] / fast[name]:.2f} times")


if __name__ == "__main__":
    main()
