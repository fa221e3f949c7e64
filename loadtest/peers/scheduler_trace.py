"""The simulator against the running engine: the same trace through both.

    python -m loadtest.peers.scheduler_trace

One server records the size and time of its steps while it answers requests of many lengths; the simulator's step
time is fitted to those. Another server, which records nothing, then answers a trace through its gRPC door, and the
simulator plays the same trace with the real batcher. Ours is the simulator, the peer the engine: ratios near 1 are
what is wanted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from loadtest.arrivals import PoissonArrivals, take
from loadtest.client import open_loop
from loadtest.grpc_door import GrpcDoor
from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from loadtest.peers.server import DEFAULT_MODEL, serving
from loadtest.record import RequestRecord
from loadtest.stats import percentile, summarize
from loadtest.workload import FixedLengths, LogNormalLengths, TokenPrompts, Work, Workload
from protos.shoal.v1 import admin_pb2, admin_pb2_grpc

__all__ = ["findings_of", "trace_lines"]

_LENGTHS = LogNormalLengths((160.0, 0.9), (48.0, 0.6))
_MAX_MODEL_LEN = 4096
_IDLE_TOKENS, _IDLE_ROUNDS = 16, 15
_MAX_BATCH_SIZE, _MAX_BATCH_TOKENS = 64, 2048
_CONFIG = f"""
inference: {{max_batch_size: {_MAX_BATCH_SIZE}, max_batch_tokens: {_MAX_BATCH_TOKENS}, max_model_len: {_MAX_MODEL_LEN}}}
resources: {{cache_size: 1GiB}}
"""


def trace_lines(work: Sequence[Work], offsets_s: Sequence[float]) -> list[str]:
    """The trace as the simulator reads it."""
    return [
        json.dumps({"at_s": at_s, "prompt_tokens": one.num_prompt_tokens, "output_tokens": one.num_output_tokens})
        for one, at_s in zip(work, offsets_s, strict=True)
    ]


def findings_of(
    records: Sequence[RequestRecord], simulated: dict[str, Any], facts: dict[str, str], *, idle_s: float
) -> Findings:
    """`idle_s` is what a prompt of `_IDLE_TOKENS` takes to its only token while nobody else asks: what of it is no step
    is the doors', and is added to what the simulator, which has none, says. Raises RuntimeError where a request failed.
    """
    summary = summarize(records)
    if summary.num_errors:
        raise RuntimeError(f"{summary.num_errors} requests failed: {summary.errors}")
    steps = simulated["step_time"]
    door_s = max(0.0, idle_s - steps["fixed_s"] - _IDLE_TOKENS * steps["prefill_token_s"])
    rate = simulated["num_output_tokens"] / simulated["duration_s"]
    pairs = [("throughput", "tokens/s", rate, summary.output_tokens_per_s)]
    measured = {"time to first token": summary.ttft, "end to end": summary.e2e}
    for (words, distribution), name in zip(measured.items(), ("ttft_s", "e2e_s"), strict=True):
        assert distribution is not None
        ordered = sorted(door_s + seconds for seconds in simulated[name])
        pairs += [
            (f"{words}, {label}", "ms", 1e3 * percentile(ordered, percent), 1e3 * getattr(distribution, label))
            for label, percent in (("p50", 50.0), ("p99", 99.0))
        ]
    figures = tuple(Figure(what=what, unit=unit, ours=(ours,), peers=(peer,)) for what, unit, ours, peer in pairs)
    errors = ", ".join(f"{what} {ours / peer - 1:+.0%}" for what, _, ours, peer in pairs)
    fitted = {name: f"{value:.3g}" for name, value in steps.items()}
    facts = facts | {
        "error of the simulator": errors,
        "added for the doors": f"{1e3 * door_s:.1f} ms a request, measured while nobody else asked",
        "step time": f"{fitted}; median error of a single step {simulated['fit_error']:.1%}",
    }
    return Findings(title="The simulator against the engine", peer="the engine", figures=figures, facts=facts)


async def _play(address: str, work: Sequence[Work], offsets_s: Sequence[float]) -> list[RequestRecord]:
    async with aclosing(GrpcDoor(address)) as door:
        return await open_loop(door.generate, work, offsets_s)


def _cut(count: int, seed: int, vocab_size: int) -> list[Work]:
    workload = Workload(
        lengths=_LENGTHS, prompts=TokenPrompts(vocab_size), seed=seed, max_model_len=_MAX_MODEL_LEN // 2
    )
    return list(islice(workload.requests(), count))


def _vocab_size(address: str) -> int:
    async def ask() -> int:
        async with aclosing(GrpcDoor(address)) as door:
            return (await door.model()).vocab_size

    return asyncio.run(ask())


def _group(address: str) -> admin_pb2.DPGroupStatus:
    with grpc.insecure_channel(address) as channel:
        status = admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=20.0)
    return status.engines[0].dp_groups[0]


def _calibrate(model_path: str, folder: Path, requests: int) -> float:
    """Steps of all sizes: few and many sequences, short and long prompts. Returns the seconds of an idle request."""
    config = f"{_CONFIG}scheduling: {{record_steps: {folder}}}\n"
    with serving("--model-path", model_path, config=config) as server:
        vocab_size = _vocab_size(server.address)
        for number, rate in enumerate((0.7, 1.5, 3.0)):
            progress(f"recording steps at {rate:g} requests/s")
            work = _cut(requests, 100 + number, vocab_size)
            offsets_s = take(PoissonArrivals(rate, seed=100 + number), count=requests)
            asyncio.run(_play(server.address, work, offsets_s))
        return median(asyncio.run(_idle(server.address, vocab_size)))


async def _idle(address: str, vocab_size: int) -> list[float]:
    """Times to the only token of short prompts, one after the other."""
    workload = Workload(lengths=FixedLengths(_IDLE_TOKENS, 1), prompts=TokenPrompts(vocab_size), seed=55)
    async with aclosing(GrpcDoor(address)) as door:
        records = [await door.generate(one, time.perf_counter()) for one in islice(workload.requests(), _IDLE_ROUNDS)]
    return [record.ttft_s for record in records if record.ttft_s is not None]


def _simulate(folder: Path, lines: Sequence[str], group: admin_pb2.DPGroupStatus) -> dict[str, Any]:
    trace, output = folder / "trace.jsonl", folder / "simulated.json"
    trace.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "max_batch_size": _MAX_BATCH_SIZE,
        "max_batch_tokens": _MAX_BATCH_TOKENS,
        "max_model_len": _MAX_MODEL_LEN,
        "block_size": group.block_size,
        "num_blocks": group.num_blocks,
        "order": "deadline",
    }
    command = [sys.executable, "-m", "scheduler.simulator.replay", str(trace), "--steps", str(folder / "steps")]
    command += ["--settings", json.dumps(settings), "--json", str(output)]
    subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603
    simulated: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return simulated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", default=str(DEFAULT_MODEL))
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second of the trace")
    parser.add_argument("--requests", type=int, default=90)
    parser.add_argument("--calibration", type=int, default=30, help="requests at each of three rates")
    options = begin(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        idle_s = _calibrate(options.model_path, folder / "steps", options.calibration)
        with serving("--model-path", options.model_path, config=_CONFIG) as server:
            work = _cut(options.requests, 7, _vocab_size(server.address))
            offsets_s = take(PoissonArrivals(options.rate, seed=7), count=options.requests)
            group = _group(server.address)
            progress(f"the trace: {options.requests} requests at {options.rate:g}/s")
            asyncio.run(_play(server.address, _cut(2, 99, _vocab_size(server.address)), [0.0, 0.0]))
            records = asyncio.run(_play(server.address, work, offsets_s))
            command = server.command
        simulated = _simulate(folder, trace_lines(work, offsets_s), group)
    facts = {
        "server": f"`{command}`",
        "work": f"{options.requests} requests, Poisson at {options.rate:g}/s, {_LENGTHS}",
        "fitted to": f"{options.calibration} requests at each of 0.7, 1.5 and 3 a second, other ones",
    }
    deliver(findings_of(records, simulated, facts, idle_s=idle_s), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
