"""One mixture-of-experts layer of DeepSeek-V3's own size in int8: `python -m tests.integration.measure_moe_layer`.

256 experts of 44 million parameters, and the shared one: it must load and run within this machine's memory. Its time
per token is told beside the least that reading its weights can take: the bytes of the experts that the token's gate
chose, the shared expert's and the gate's own, at the speed that `measure_memory` finds.

The checkpoint is in FP8, as DeepSeek publishes it, of random weights that all experts have in common, each in memory of
its own; they become int8 as they are loaded.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from loadtest.peers.moe import random_model
from tests.integration.measure_memory import read_bandwidth
from tests.unit.workers.ranks import settings_for
from workers.assemble import assemble
from workers.model.moe import MoE
from workers.parallel.collectives import SingleRank
from workers.parallel.dispatch import Routing
from workers.parallel.plan import ParallelPlan
from workers.runner import Runner

_TOKENS = (1, 4, 16)
_WARM = 2


class _Chosen:
    """Remembers a call's experts."""

    def __init__(self) -> None:
        self.num_experts = 0

    def record(self, layer: int, routing: Routing) -> None:
        self.num_experts = len(set(routing.expert_ids.flatten().tolist()))


def _load(folder: Path, num_threads: int) -> Runner:
    settings = settings_for(
        folder,
        dtype="bfloat16",
        quantization="int8",
        max_model_len=64,
        block_size=16,
        cache_bytes=1 << 22,
        num_threads=num_threads,
    )
    return assemble(settings, ParallelPlan().place(0), SingleRank(), progress=None)


@torch.inference_mode()
def _times(layer: MoE, sizes: tuple[int, int, int], num_tokens: int, calls: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, and the bytes of weights that it had to read; every call has tokens of its own."""
    hidden, expert_bytes, always_bytes = sizes
    generator = torch.Generator().manual_seed(num_tokens)
    chosen = _Chosen()
    layer.recorder = chosen
    taken_s, read_bytes = [], []
    for _ in range(calls + _WARM):
        x = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
        started_s = time.perf_counter()
        layer(x)
        taken_s.append(time.perf_counter() - started_s)
        read_bytes.append(float(chosen.num_experts * expert_bytes + always_bytes))
    layer.recorder = None
    return taken_s[_WARM:], read_bytes[_WARM:]


def measure(folder: Path, num_threads: int, calls: int) -> Findings:
    torch.set_num_threads(num_threads)
    bandwidth = read_bandwidth(num_threads)
    progress(f"memory: {bandwidth / 1e9:.1f} GB/s")
    runner = _load(folder, num_threads)
    report, config = runner.report, runner.model_config
    progress(f"loaded {report.weight_bytes / 1e9:.2f} GB in {report.load_s:.1f} s")
    assert config.moe is not None
    (layer,) = runner._decoder.mixtures.values()
    hidden, shared = config.hidden_size, config.moe.shared_size
    expert_bytes = 3 * hidden * config.moe.expert_size
    sizes = (hidden, expert_bytes, 3 * hidden * shared + 4 * hidden * config.moe.gate.num_experts)
    figures = []
    for num_tokens in _TOKENS:
        taken_s, read_bytes = _times(layer, sizes, num_tokens, calls)
        bound_s = [size / bandwidth for size in read_bytes]
        what = f"a step of {num_tokens}, per token"
        each = (1e3 / num_tokens * statistics.median(taken_s), 1e3 / num_tokens * statistics.median(bound_s))
        progress(f"{what}: {each[0]:.2f} ms, bound {each[1]:.2f} ms")
        figures.append(Figure(what=what, unit="ms", ours=(each[0],), peers=(each[1],)))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Findings(
        title="One mixture-of-experts layer of DeepSeek-V3's size, int8",
        peer="reading its weights",
        figures=tuple(figures),
        facts={
            "layer": f"{config.moe.gate.num_experts} experts, top {config.moe.gate.top_k}, hidden {hidden}, "
            f"{config.moe.expert_size} wide",
            "kernels": f"{report.kernels}; {num_threads} threads",
            "memory read at": f"{bandwidth / 1e9:.1f} GB/s (`python -m tests.integration.measure_memory`)",
            "weights, with the model's attention and embeddings": f"{report.weight_bytes / 1e9:.2f} GB, loaded in "
            f"{report.load_s:.1f} s",
            "peak memory of the process": f"{peak_bytes / 1e9:.2f} GB",
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", type=Path, help="another model; by default the one of random weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=20)
    options = begin(parser)
    folder = options.model_path or random_model("v3-moe-layer", "--fp8", "--same-experts")
    deliver(measure(folder, options.threads, options.calls), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
