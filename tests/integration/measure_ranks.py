"""The figures of workers/README.md: `python -m tests.integration.measure_ranks sampler|guided|channel|collectives`."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import cast

import torch

from cluster.config.environment import cache_folder
from cluster.models import catalog, registry
from protos.shoal.v1 import session_pb2
from scheduler.request import Grammar, GrammarKind, SamplingParams
from tests.unit.workers.sampler.plans import decoding, plan
from workers.guided import GrammarCompiler
from workers.parallel.channel import PlanListener, PlanReceiver, PlanSender, connect
from workers.parallel.collectives import GlooCollectives, ProcessGroupCollectives
from workers.parallel.groups import Groups, host_store
from workers.parallel.plan import ParallelPlan
from workers.sampler import Sampler
from workers.settings import EngineSettings

HOST, SECRET = "127.0.0.1", b"secret"
KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "greedy, repetition penalty": SamplingParams(temperature=0.0, repetition_penalty=1.1),
    "greedy, 5 logprobs": SamplingParams(temperature=0.0, logprobs=5),
    "temperature 1": SamplingParams(),
    "top-k 50": SamplingParams(top_k=50),
    "top-k 20, top-p 0.95, temperature 0.6": SamplingParams(top_k=20, top_p=0.95, temperature=0.6),
    "top-p 0.95": SamplingParams(top_p=0.95),
}


def median_ms(action: Callable[[], object], clock: Callable[[], float], times: int) -> float:
    taken = []
    for _ in range(times):
        started_s = clock()
        action()
        taken.append(clock() - started_s)
    return 1000 * statistics.median(taken)


def sampler() -> None:
    """Processor time of one thread for 16 rows: other work on the machine does not show."""
    torch.set_num_threads(1)
    logits = torch.randn(16, 49_152, generator=torch.Generator().manual_seed(0)) * 3
    subject = Sampler()
    for name, params in KINDS.items():
        batch = plan(*[decoding(dataclasses.replace(params, seed=i), output=range(500)) for i in range(16)])
        subject.sample(logits, batch)
        print(f"{name}: {median_ms(partial(subject.sample, logits, batch), time.thread_time, 20):.1f} ms")


def guided() -> None:
    """Processor time of 16 greedy rows, each in a JSON document of its own, beyond that of as many unguided ones."""
    torch.set_num_threads(1)
    folder = catalog.pull(registry.DEFAULT, cache_folder())
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "maxItems": 8},
        },
        "required": ["name", "age", "tags"],
    }
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
    compiler = GrammarCompiler.from_folder(folder, 49_152)
    assert compiler is not None
    compiler.submit(Grammar(kind=GrammarKind.REGEX, text="a"), frozenset({2})).result()  # reads the tokenizer
    started_s = time.perf_counter()
    compiled = compiler.submit(grammar, frozenset({2})).result()
    print(f"compiling: {1000 * (time.perf_counter() - started_s):.1f} ms")
    compiler.close()
    noise = torch.Generator().manual_seed(0)
    taken: dict[str, list[float]] = {"plain": [], "guided": []}
    for name, own in (("plain", None), ("guided", compiled)):
        params = SamplingParams(temperature=0.0, grammar=own)
        rows = [decoding(params, output=()) for _ in range(16)]
        for number, row in enumerate(rows):
            row.key = str(number)
        subject = Sampler()
        for _ in range(200):
            logits = torch.randn(16, 49_152, generator=noise)
            started_s = time.process_time()
            result = subject.sample(logits, plan(*rows))
            taken[name].append(time.process_time() - started_s)
            for row, made in zip(rows, result.sequences, strict=True):
                if made.token_id is not None and not made.complete:
                    cast("list[int]", row.history).append(made.token_id)
                    row.num_computed += 1
    plain = statistics.median(taken["plain"])
    for name, value in (("median", statistics.median(taken["guided"])), ("worst", max(taken["guided"]))):
        print(f"masks of 16 rows, {name}: {1000 * (value - plain):.2f} ms a step")


def channel() -> None:
    """From `send` to `receive` of a decode step of 16 sequences with 10 blocks each, every 2 ms."""
    listener = PlanListener(HOST)
    ours, theirs = multiprocessing.Pipe()
    follower = multiprocessing.Process(target=_receive, args=(listener.port, theirs))
    follower.start()
    sender = PlanSender(1, listener.accept({1}, generation=1, secret=SECRET, timeout_s=60))
    step = session_pb2.StepPlan(
        generation=1,
        token_ids=range(16),
        num_tokens=[1] * 16,
        num_computed=[100] * 16,
        block_ids=range(160),
        num_blocks=[10] * 16,
        num_logits=[1] * 16,
    )
    for _ in range(500):
        time.sleep(0.002)
        step.traceparent = repr(time.monotonic())
        sender.send(step)
    sender.send(session_pb2.StepPlan(generation=1, stop=True))
    taken = ours.recv()
    follower.join()
    print(f"plan channel: median {1e6 * statistics.median(taken):.0f} us, best {1e6 * min(taken):.0f} us")


def _receive(port: int, results: Connection) -> None:
    receiver = PlanReceiver(1, connect(HOST, port, rank=1, generation=1, secret=SECRET, timeout_s=60))
    taken: list[float] = []
    while not (step := receiver.receive()).stop:
        taken.append(time.monotonic() - float(step.traceparent))
    results.send(taken)


def collectives() -> None:
    """An all-reduce of 16 x 576 bf16 values between ranks of one thread each; over gloo also as gloo's own ring."""
    for kind, num_ranks in (("shm", 2), ("gloo", 2), ("gloo", 3), ("gloo", 4)):
        store = host_store(HOST)
        ranks = [
            multiprocessing.Process(target=_reduce, args=(rank, num_ranks, store.port, kind))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


def _reduce(rank: int, num_ranks: int, port: int, kind: str) -> None:
    torch.set_num_threads(1)
    settings = EngineSettings(
        engine="e0",
        model_name="none",
        model_path="",
        plan=ParallelPlan(tensor=num_ranks),
        dtype="bfloat16",
        device="cpu",
        max_model_len=64,
        collectives=kind,
    )
    groups = Groups.join(settings, rank, generation=1, store=(HOST, port), hosts=dict.fromkeys(range(num_ranks), HOST))
    x = torch.zeros(16, 576, dtype=torch.bfloat16)
    ways: dict[str, Callable[[], torch.Tensor]] = {kind: lambda: groups.tensor.all_reduce(x)}
    if isinstance(ring := groups.tensor, GlooCollectives) and kind == "gloo":
        ways["gloo's ring"] = lambda: ProcessGroupCollectives.all_reduce(ring, x)
    taken_ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            taken_ms[name].append(median_ms(way, time.perf_counter, 100))
    if rank == 0:
        for name, found in taken_ms.items():
            print(f"{num_ranks} ranks, {name}: median {1000 * statistics.median(found):.0f} us")
    groups.close()


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    {"sampler": sampler, "guided": guided, "channel": channel, "collectives": collectives}[sys.argv[1]]()
