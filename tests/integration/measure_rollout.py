"""What clients see while engines come and go: `python -m tests.integration.measure_rollout`.

Serves a checkpoint of random weights, shaped as DeepSeek V3, in two engines of two DP groups that share their experts
(`inference.deterministic`), keeps plain streams open all the while, and gives the orders of an operator one after the
other. The clients neither retry nor resume: whatever goes wrong with a stream is a failed request. Every answer is
compared with the undisturbed one, and the pauses are looked at operation by operation. Clients and operators have
machines of their own: where it may, this process goes before the rest of its session, and the commands behind it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cluster.chaos.campaign import works
from cluster.chaos.load import Load, StreamRecord, Work, reference
from cluster.client.held import CHANNEL_OPTIONS
from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from tests.checkpoints import tiny_deepseek
from tests.integration.served import SHOAL, Served, serving
from tests.priority import AS_OTHERS, go_first

_LONGEST_PAUSE_S = 1.0
_SETTLE_S = 3.0
_LAG_EVERY_S = 0.02
_CONFIG = """
parallel: {data: 2}
inference: {deterministic: true, max_model_len: 1024}
cluster: {engines: 2, max_engines: 4, drain_timeout_s: 20.0}
"""
_NEXT = "model: {{path: {model}}}\nparallel: {{data: 2}}\nresources: {{cache_size: 32MiB}}\n"
_NEXT += "inference: {{deterministic: true, max_model_len: 1024{more}}}\n"


@dataclass(frozen=True, slots=True)
class Order:
    """A command of an operator; `refused_with` is what a failure must say, empty where it must succeed."""

    what: str
    arguments: tuple[str, ...]
    refused_with: str = ""
    beside: Callable[[Served], Coroutine[None, None, None]] | None = None  # what happens meanwhile


@dataclass(slots=True)
class Done:
    """An order that was carried out, and what its time showed."""

    order: Order
    began_s: float
    ended_s: float = 0.0
    lines: list[str] = field(default_factory=list)
    late_s: float = 0.0  # how late this process itself came to read its streams, at most

    def longest_pause_s(self, records: Sequence[StreamRecord]) -> float:
        """Of the waits between two messages of a stream that reach into the order's time."""
        return self.pauses(records)[0][0]

    def pauses(self, records: Sequence[StreamRecord]) -> list[tuple[float, float]]:
        """These waits, the longest first, and when in the order's time each began."""
        gaps = [gap for record in records for gap in self._gaps(record)]
        return sorted(gaps, reverse=True) or [(0.0, 0.0)]

    def longest_first_s(self, records: Sequence[StreamRecord]) -> float:
        """Of the waits for a first token."""
        first = [(r.started_s, r.arrivals[0][0]) for r in records if r.arrivals]
        return max((end - start for start, end in first if self._touches(start, end)), default=0.0)

    def _gaps(self, record: StreamRecord) -> list[tuple[float, float]]:
        times = [at_s for at_s, _ in record.arrivals]
        pairs = itertools.pairwise(times)
        return [(end - start, start - self.began_s) for start, end in pairs if self._touches(start, end)]

    def _touches(self, start_s: float, end_s: float) -> bool:
        return end_s >= self.began_s and start_s <= self.ended_s


def orders(folder: Path, model: Path) -> tuple[Order, ...]:
    """In the order in which they are given."""
    config = _config(folder, "next", model)
    slow = _config(folder, "slow", model, more=", max_batch_size: 1")
    broken = _config(folder, "broken", _cut_short(folder / "broken", model))
    watch = ("--watch-s", "4", "--max-slowdown", "20")
    canary = ("--strategy", "canary", "--weight", "0.3", *watch)
    return (
        Order("nothing", ()),
        Order("scale up", ("scale", "3")),
        Order("drain of a rank", ("drain", "engine-0/rank-1", "--timeout-s", "2")),
        Order("its end", ("drain", "engine-0/rank-1", "--undo")),
        Order("drain of an engine", ("drain", "engine-0", "--timeout-s", "2")),
        Order("rolling update", ("rollout", config, "--version", "2", *watch)),
        Order("blue-green", ("rollout", config, "--version", "3", "--strategy", "blue-green", *watch)),
        Order("canary", ("rollout", config, "--version", "4", *canary)),
        Order(
            "canary that is slow, taken back",
            ("rollout", slow, "--version", "slow", *canary[:4], "--watch-s", "60", "--max-slowdown", "4"),
            refused_with="the first token takes",
        ),
        Order(
            "canary that crashes, taken back",
            ("rollout", config, "--version", "crash", *canary[:4], "--watch-s", "60", "--max-slowdown", "20"),
            refused_with="was taken back",
            beside=_crash,
        ),
        Order(
            "version whose weights are cut short, refused",
            ("rollout", broken, "--version", "broken", *watch),
            refused_with="is truncated",
        ),
        Order("scale down", ("scale", "1")),
    )


def _config(folder: Path, name: str, model: Path, *, more: str = "") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(_NEXT.format(model=model, more=more))
    return str(path)


def _cut_short(folder: Path, model: Path) -> Path:
    """The model, as an interrupted copy leaves it."""
    shutil.copytree(model, folder)
    (weights,) = folder.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


async def _crash(served: Served) -> None:
    """Kills the canary's ranks whenever they answer somebody."""
    killed: set[int] = set()
    while True:
        status = await asyncio.to_thread(served.status)
        for engine in status.engines:
            busy = {group.index for group in engine.dp_groups if group.num_running}
            for rank in engine.ranks:
                if engine.version == "crash" and rank.dp_group in busy and rank.pid not in killed:
                    os.kill(rank.pid, signal.SIGKILL)
                    killed.add(rank.pid)
        await asyncio.sleep(0.1)


async def _give(order: Order, served: Served) -> Done:
    """Carries an order out under the load that is running. Raises RuntimeError where it goes otherwise than it must."""
    done = Done(order, time.monotonic())
    if not order.arguments:
        await asyncio.sleep(2 * _SETTLE_S)
    else:
        address = ("--address", f"127.0.0.1:{served.port}")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *AS_OTHERS, "nice", "-n", "19", *SHOAL, *order.arguments, *address, stdout=pipe, stderr=pipe
        )
        beside = asyncio.create_task(order.beside(served)) if order.beside is not None else None
        out, errors = (each.decode() for each in await process.communicate())
        if beside is not None:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
        done.lines = (out + errors).splitlines()
        if (process.returncode != 0) != bool(order.refused_with) or order.refused_with not in errors:
            raise RuntimeError(f"{order.what}: {process.returncode}: {out}{errors}\n{served.output[-4000:]}")
    done.ended_s = time.monotonic()
    return done


class _Lag:
    """How late this process itself comes to do what it meant to: a pause that is its own is nobody else's."""

    def __init__(self) -> None:
        self.late: list[tuple[float, float]] = []  # by how much, and when
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        self._task.cancel()

    def longest_s(self, done: Done) -> float:
        return max((late_s for late_s, at_s in self.late if done.began_s <= at_s <= done.ended_s), default=0.0)

    async def _run(self) -> None:
        while True:
            meant_s = time.monotonic() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self.late.append((time.monotonic() - meant_s, meant_s))


async def run(
    served: Served, asked: Sequence[Order], num_streams: int
) -> tuple[list[Done], Load, Mapping[Work, list[int]]]:
    """All orders under one load."""

    def connect() -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options=CHANNEL_OPTIONS)

    some = works(8, 120, seed=1)
    expected = await reference(connect, some, ())
    load = Load(lambda: connect, some, num_streams=num_streams, patience_s=0.0)
    running = asyncio.create_task(load.run())
    lag = _Lag()
    done = []
    try:
        await asyncio.sleep(_SETTLE_S)
        for order in asked:
            done.append(await _give(order, served))
            took_s = done[-1].ended_s - done[-1].began_s
            pauses = ", ".join(
                f"{pause_s:.2f} s at {at_s:.1f} s" for pause_s, at_s in done[-1].pauses(load.records)[:5]
            )
            progress(f"{order.what}: {took_s:.1f} s; longest pauses: {pauses}")
            done[-1].late_s = lag.longest_s(done[-1])
            progress(f"    we ourselves were late by {done[-1].late_s:.2f} s at most")
            for line in done[-1].lines:
                progress(f"    {line}")
    finally:
        lag.stop()
        load.stop()
        await running
    return done, load, expected


def findings(done: Sequence[Done], load: Load, expected: Mapping[Work, list[int]], priority: str) -> Findings:
    """Rows by order: what it took, and the longest pause."""
    failed = [record for record in load.records if not record.finished]
    other = [record for record in load.records if record.finished and record.token_ids != expected[record.work]]
    for record in failed:
        progress(f"failed: {record.error or record.broken}")
    figures = [
        Figure(what="requests that failed, of all", unit="requests", ours=(len(failed),), goal=0, goal_is_most=True),
        Figure(what="answers other than undisturbed", unit="requests", ours=(len(other),), goal=0, goal_is_most=True),
    ]
    for each in done:
        figures += _rows(each, load.records)
    return Findings(
        title="Engines that come and go under load",
        peer="",
        figures=tuple(figures),
        facts={
            "model": "random weights in DeepSeek-V3's form, three layers; engines of two DP groups that share experts",
            "requests": f"{len(load.records)}, plain streams that neither retry nor resume",
            "the client": priority,
            "longest wait for a first token": _each(done, lambda it: it.longest_first_s(load.records)),
            "this client itself was late, so that a pause may be its own, by at most": _each(
                done, lambda it: it.late_s
            ),
            "the machine meanwhile": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
        },
    )


def _each(done: Sequence[Done], seconds: Callable[[Done], float]) -> str:
    return ", ".join(f"{it.order.what} {seconds(it):.2f} s" for it in done)


def _rows(done: Done, records: Sequence[StreamRecord]) -> list[Figure]:
    what = done.order.what
    pause = Figure(
        what=f"{what}: longest pause of a stream",
        unit="s",
        ours=(done.longest_pause_s(records),),
        goal=_LONGEST_PAUSE_S if done.order.arguments and done.order.beside is None else None,
        goal_is_most=True,
    )
    took = Figure(what=f"{what}: it took", unit="s", ours=(done.ended_s - done.began_s,))
    return [pause, took]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--only", help="only the orders whose names contain this")
    options = begin(parser)
    with tempfile.TemporaryDirectory(prefix="rollout-") as name:
        folder = Path(name)
        model = tiny_deepseek(folder / "tiny", max_position_embeddings=1024)
        asked = [order for order in orders(folder, model) if options.only is None or options.only in order.what]
        with serving(model, config=_CONFIG) as served:
            priority = go_first()
            found = findings(*asyncio.run(run(served, asked, options.streams)), priority)
    deliver(found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
