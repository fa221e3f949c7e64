"""The served model against transformers' `generate`: the same folder, type and prompts, turn by turn in one run.

    python -m loadtest.peers.transformers_generate

Greedy, with fixed lengths on both sides. The server is asked through its gRPC door, as its clients ask it;
transformers is called in this process, without any wire, with its default number of threads, and for the concurrent
work with its best case: one static batch of equal lengths. Every round has fresh prompts, the same for both sides.
While one side has its turn the other one idles; what all other processes took during transformers' turns is told.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers

from loadtest.client import ModelFacts, open_loop
from loadtest.grpc_door import GrpcDoor
from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from loadtest.peers.others import OtherCpu
from loadtest.peers.server import DEFAULT_MODEL, serving
from loadtest.workload import TokenPrompts, Work

__all__ = ["TASKS", "Task", "measure"]

# After a turn, worker threads of either side may still spin for work that does not come; let them fall asleep.
_SETTLE_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Work of one shape; `counted` is how many tokens of it the figure counts."""

    what: str
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    counted: int
    floor: float

    def prompts(self, vocab_size: int, rng: random.Random) -> list[tuple[int, ...]]:
        prompts = TokenPrompts(vocab_size)
        return [prompts.make(rng, self.num_prompt_tokens) for _ in range(self.num_requests)]


TASKS = (
    Task(
        what="decode alone, 16 in / 128 out",
        num_requests=1,
        num_prompt_tokens=16,
        num_output_tokens=128,
        counted=128,
        floor=1.2,
    ),
    Task(
        what="prefill, 1024 in / 1 out",
        num_requests=1,
        num_prompt_tokens=1024,
        num_output_tokens=1,
        counted=1024,
        floor=1.0,
    ),
    Task(
        what="16 at once, 128 in / 128 out each",
        num_requests=16,
        num_prompt_tokens=128,
        num_output_tokens=128,
        counted=16 * 128,
        floor=1.5,
    ),
)


class _Transformers:
    """The peer, loaded from the same folder in the same type."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        self._model.generation_config = transformers.GenerationConfig(do_sample=False, use_cache=True)

    def run(self, task: Task, prompts: list[tuple[int, ...]]) -> float:
        """Seconds for the whole batch."""
        token_ids = torch.tensor(prompts)
        started_s = time.perf_counter()
        # No end-of-sequence token is configured, so every row runs to the last of its tokens.
        output = self._model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=task.num_output_tokens
        )
        duration_s = time.perf_counter() - started_s
        expected = (task.num_requests, task.num_prompt_tokens + task.num_output_tokens)
        if tuple(output.shape) != expected:
            raise RuntimeError(f"transformers made {tuple(output.shape)} where {expected} were asked for")
        return duration_s


async def _run_served(door: GrpcDoor, task: Task, prompts: list[tuple[int, ...]]) -> float:
    """Seconds from the first request to the last token of all."""
    work = [Work(prompt=prompt, num_output_tokens=task.num_output_tokens) for prompt in prompts]
    records = await open_loop(door.generate, work, [0.0] * len(work))
    for record in records:
        if record.error:
            raise RuntimeError(f"{task.what}: {record.error}")
    return max(record.end_s for record in records) - min(record.intended_s for record in records)


def measure(address: str, folder: Path, rounds: int, tasks: Sequence[Task] = TASKS) -> Findings:
    """Rounds of server, then transformers, for each task in turn; a round before them warms both up."""
    rng = random.Random(0)
    ours: dict[str, list[float]] = {task.what: [] for task in tasks}
    peers: dict[str, list[float]] = {task.what: [] for task in tasks}
    shares = [0.0]
    with asyncio.Runner() as runner:
        door = runner.run(_open(address))
        facts = runner.run(door.model())
        _check(facts, folder)
        peer = _Transformers(folder, facts.dtype)
        for number in range(rounds + 1):
            for task in tasks:
                prompts = task.prompts(facts.vocab_size, rng)
                time.sleep(_SETTLE_S)
                served_s = runner.run(_run_served(door, task, prompts))
                time.sleep(_SETTLE_S)
                others = OtherCpu([psutil.Process()])
                peer_s = peer.run(task, prompts)
                share = others.cores()
                progress(
                    f"round {number} of {rounds}: {task.what}: {served_s:.2f} s served, {peer_s:.2f} s transformers"
                )
                if number:
                    ours[task.what].append(task.counted / served_s)
                    peers[task.what].append(task.counted / peer_s)
                    shares.append(share)
        runner.run(door.aclose())
    return _findings(facts, tasks, ours, peers, max(shares))


async def _open(address: str) -> GrpcDoor:
    return GrpcDoor(address)


def _check(facts: ModelFacts, folder: Path) -> None:
    if not facts.dtype or not hasattr(torch, facts.dtype):
        raise ValueError(f"the server tells no type that torch knows: {facts.dtype!r}")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no model; `shoal models pull` one, or give --model-path")


def _findings(
    facts: ModelFacts,
    tasks: Sequence[Task],
    ours: dict[str, list[float]],
    peers: dict[str, list[float]],
    share: float,
) -> Findings:
    figures = tuple(
        Figure(
            what=task.what,
            unit="tokens/s",
            ours=tuple(ours[task.what]),
            peers=tuple(peers[task.what]),
            goal=task.floor,
        )
        for task in tasks
    )
    return Findings(
        title="Served through the gRPC door, against transformers' generate",
        peer=f"transformers {transformers.__version__}",
        figures=figures,
        facts={
            "model": f"{facts.name} in {facts.dtype}",
            "transformers' threads": str(torch.get_num_threads()),
            "cores that other processes kept busy during transformers' turns, at most": f"{share:.2f}",
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", help="a running server of the same folder; by default one is started")
    parser.add_argument("--model-path", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    options = begin(parser)
    with ExitStack() as stack:
        address = options.address
        if not address:
            address = stack.enter_context(serving("--model-path", str(options.model_path))).address
        findings = measure(address, options.model_path, options.rounds)
    deliver(findings, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
