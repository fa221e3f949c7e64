"""Experts on two ranks of one core each, against one rank of two threads: `python -m tests.integration.measure_ep`.

Both engines are up; they take turns with the same work, asked of their ranks' sessions as a front door does it. An
engine without work sleeps. The model is that of `loadtest.peers.moe`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from loadtest.peers.moe import random_model
from loadtest.peers.server import DEFAULT_MODEL
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import Engine
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

_TIMEOUT_S = 300.0
_SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class _Work:
    what: str
    num_sequences: int
    num_prompt: int
    num_output: int
    goal: float | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.num_output if self.num_output > 1 else self.num_sequences * self.num_prompt


WORK = (
    _Work("16 at once, 128 in / 128 out each", 16, 128, 128, 0.9),
    _Work("prefill of 4 at once, 1024 in / 1 out each", 4, 1024, 1),
    _Work("decode alone, 16 in / 64 out", 1, 16, 64),
)


def _settings(folder: Path, name: str, plan: ParallelPlan, num_threads: int) -> EngineSettings:
    return EngineSettings(
        engine=name,
        model_name="moe",
        model_path=str(folder),
        plan=plan,
        dtype="bfloat16",
        device="cpu",
        num_threads=num_threads,
        max_model_len=2048,
        cache_bytes=1 << 28,
        step_timeout_s=30.0,
    )


async def _run(addresses: list[str], work: _Work, random: Random) -> float:
    """Tokens a second, the sequences dealt out over the groups."""
    prompts = [[random.randrange(3, 30_000) for _ in range(work.num_prompt)] for _ in range(work.num_sequences)]

    async def one_group(index: int) -> tuple[float, float]:
        async with FrontDoorStream(addresses[index]) as stream:
            started_s = time.perf_counter()
            numbers = range(index, work.num_sequences, len(addresses))
            for number in numbers:
                await stream.submit(number, prompts[number], sampling(work.num_output))
            await stream.finish(*numbers, timeout_s=_TIMEOUT_S)
            assert all(len(stream.tokens[number]) == work.num_output for number in numbers)
            return started_s, time.perf_counter()

    marks = await asyncio.gather(*(one_group(index) for index in range(len(addresses))))
    return work.num_tokens / (max(end for _, end in marks) - min(start for start, _ in marks))


def measure(folder: Path, rounds: int, works: Sequence[_Work] = WORK) -> Findings:
    random = Random(0)
    found: dict[str, tuple[list[float], list[float]]] = {work.what: ([], []) for work in works}
    plans = (("spread", ParallelPlan(data=2), 1), ("single", ParallelPlan(), 2))
    with ExitStack() as stack:
        loop = stack.enter_context(asyncio.Runner())  # gRPC minds being taken from one event loop to another
        engines = []
        for name, plan, num_threads in plans:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            engines.append(Engine(logs, _settings(folder, name, plan, num_threads)))
            stack.callback(engines[-1].end)
        addresses = [engine.start() for engine in engines]
        kind = engines[0].ranks[0].call("status")["dispatch"]
        for number in range(rounds + 1):  # the first one warms up
            for work in works:
                for index, per_engine in enumerate(addresses):
                    time.sleep(_SETTLE_S)
                    rate = loop.run(_run(per_engine, work, random))
                    progress(f"round {number} of {rounds}: {plans[index][0]}: {work.what}: {rate:.1f} tokens/s")
                    if number:
                        found[work.what][index].append(rate)
        for engine in engines:
            engine.stop()
    return Findings(
        title="Experts spread over two ranks of one thread, against one rank of two threads",
        peer="one rank",
        figures=tuple(
            Figure(
                what=work.what,
                unit="tokens/s",
                ours=tuple(found[work.what][0]),
                peers=tuple(found[work.what][1]),
                goal=work.goal,
            )
            for work in works
        ),
        facts={"model": "0.7 B parameters in DeepSeek-V3's form, random weights, bfloat16", "dispatch": kind},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", type=Path, help="another model; by default the one of random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the work whose name begins so, as in '16 at once'")
    options = begin(parser)
    works = [work for work in WORK if work.what.startswith(options.only)]
    if not works:
        parser.error(f"--only {options.only}: the work is {'; '.join(work.what for work in WORK)}")
    folder = options.model_path or random_model("v3-0.7b", "--tokenizer-from", str(DEFAULT_MODEL))
    deliver(measure(folder, options.rounds, works), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
