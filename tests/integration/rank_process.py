"""Ranks in processes of their own, each behind a pipe that calls its methods.

They are forked from one process that has imported everything once: torch takes each of them seconds otherwise, and
the tests start a hundred.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from scheduler.experts_regroup import regrouped
from scheduler.settings import SchedulingSettings
from workers.parallel.groups import host_store
from workers.parallel.plan import ParallelPlan
from workers.rank import Rank, RankAddress
from workers.settings import EngineSettings

__all__ = ["HOST", "SECRET", "Engine", "RankProcess", "StartEngine", "engines", "expect_idle", "small_settings"]

HOST = "127.0.0.1"
SECRET = "not much of a secret"
_FORKS = multiprocessing.get_context("forkserver")
# deepspeed is imported late by ranks that have peers.
_FORKS.set_forkserver_preload(["__main__", "tests.integration.rank_process", "deepspeed.comm"])


class _Child:
    """The process of a rank, as `subprocess.Popen` has it."""

    def __init__(self, *arguments: object) -> None:
        self._process = _FORKS.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send_signal(self, how: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, how)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()


class RankProcess:
    """One rank in a child process."""

    def __init__(self, folder: Path, settings: EngineSettings, rank: int) -> None:
        path = folder / f"settings-{rank}.json"
        path.write_text(json.dumps(dataclasses.asdict(settings)))
        self.log_path = folder / f"rank-{rank}.log"
        self._calls, theirs = _FORKS.Pipe()
        self.process = _Child(theirs, path, rank, self.log_path)
        theirs.close()
        self._writing = threading.Lock()
        self._numbers = count()
        self._answers: dict[int, Future[Any]] = {}
        self._gone = False
        self._reader = threading.Thread(target=self._read, name=f"answers of rank {rank}", daemon=True)
        self._reader.start()

    def call(self, method: str, *arguments: object) -> Any:
        """Raises RuntimeError with what the rank raised."""
        return self.begin(method, *arguments).result()

    def begin(self, method: str, *arguments: object) -> Future[Any]:
        """The same, beside other calls. From any thread."""
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()  # it comes, whoever still waits for it
        with self._writing:
            if self._gone:
                answer.set_exception(RuntimeError("the rank has died"))
                return answer
            number = next(self._numbers)
            self._answers[number] = answer
            with suppress(BrokenPipeError, ConnectionResetError):  # which its answers' end tells
                self._calls.send_bytes(
                    json.dumps({"number": number, "method": method, "arguments": arguments}).encode()
                )
        return answer

    def _read(self) -> None:
        with suppress(EOFError, ConnectionResetError):
            while True:
                told = json.loads(self._calls.recv_bytes())
                answer = self._answers.pop(told["number"])
                if "error" in told:
                    answer.set_exception(RuntimeError(told["error"]))
                else:
                    answer.set_result(told["value"])
        with self._writing:
            self._gone = True
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(RuntimeError(f"the rank has died:\n{self.log_path.read_text()}"))

    def end(self) -> None:
        """Kills what is left of it."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self._calls.close()


class Engine:
    """All ranks of an engine, led from the test."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        self.settings = settings
        self.generation = 0
        self._folder = folder
        self._store = host_store(HOST)
        self._addresses: dict[int, Any] = {}
        self.ranks = [RankProcess(folder, settings, rank) for rank in range(settings.plan.num_ranks)]

    def start(self, generation: int = 1) -> list[str]:
        """Open to start; the session addresses of the DP groups."""
        self.generation = generation
        addresses = self.on_all("open", HOST)
        self._addresses = dict(enumerate(addresses))
        self.on_all("join", generation, HOST, self._store.port, addresses)
        self.on_all("load")
        return [address for address in self.on_all("start") if address]

    def replace(self, group: int) -> None:
        """Other processes for the ranks of a DP group; they have loaded, and run nothing yet."""
        self.generation += 1
        numbers = self.settings.plan.group(group)
        for number in numbers:
            self.ranks[number].end()
            self.ranks[number] = RankProcess(self._folder, self.settings, number)
        addresses = self.on_all("open", HOST, numbers=numbers)
        self._addresses |= dict(zip(numbers, addresses, strict=True))
        self.on_all("join", self.generation, HOST, self._store.port, addresses, numbers=numbers)
        self.on_all("load", numbers=numbers)

    def regroup(self, numbers: Sequence[int]) -> dict[int, str]:
        """A new generation of these ranks; the session addresses by DP group."""
        self.generation += 1
        plan = self.settings.plan
        holdings = dict(zip(numbers, self.on_all("interrupt", self.generation, 5.0, numbers=numbers), strict=True))
        epoch = 1 + max(holding["epoch"] for holding in holdings.values())
        addresses = [self._addresses[number] for number in numbers]
        meeting = (self.generation, HOST, self._store.port, addresses, epoch)
        calls: dict[int, tuple[object, ...]] = {}
        for stage in range(plan.pipeline):
            ours = [number for number in numbers if plan.place(number).stage == stage]
            places = self._places([holdings[number] for number in ours])
            calls |= dict.fromkeys(ours, (*meeting, places))
        self._on_each("regroup", calls)
        started = self.on_all("start", numbers=numbers)
        return {n // plan.group_size: address for n, address in zip(numbers, started, strict=True) if address}

    def _places(self, holdings: Sequence[dict[str, Any]]) -> list[tuple[int, Any]]:
        """Of each layer of a stage, from what its ranks hold."""
        num_experts = holdings[0]["num_experts"]
        num_slots = num_experts + self.settings.plan.redundant_experts
        places = []
        for index, layer in enumerate(holdings[0]["layers"]):
            held = [holding["experts"][index] for holding in holdings]
            places.append((layer, regrouped(held, num_experts, num_slots=num_slots).slots))
        return places

    def on_all(self, method: str, *arguments: object, numbers: Sequence[int] | None = None) -> list[Any]:
        """Calls all ranks, or these, at once, as many steps of their life demand."""
        wanted = range(len(self.ranks)) if numbers is None else numbers
        return self._on_each(method, dict.fromkeys(wanted, arguments))

    def _on_each(self, method: str, calls: Mapping[int, Sequence[object]]) -> list[Any]:
        """The same with arguments for each."""
        values: list[Any] = [None] * len(calls)
        errors: list[Exception] = []

        def one(index: int, number: int, arguments: Sequence[object]) -> None:
            try:
                values[index] = self.ranks[number].call(method, *arguments)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(index, *call)) for index, call in enumerate(calls.items())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return values

    def stop(self) -> None:
        """In an orderly way."""
        self.on_all("stop")

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()


async def expect_idle(engine: Engine) -> None:
    """Its ranks use next to nothing of a core, over one second of several: the machine has other work, too."""
    loads = []
    for _ in range(5):
        before_s = _busy_s(engine)
        await asyncio.sleep(1)  # the claim is about time that passes
        loads.append((_busy_s(engine) - before_s) / len(engine.ranks))
        if loads[-1] < 0.02:
            return
    raise AssertionError(f"parts of a core: {loads}")


def _busy_s(engine: Engine) -> float:
    """Processor time of all ranks so far."""
    total = 0.0
    for rank in engine.ranks:
        fields = Path(f"/proc/{rank.process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


StartEngine = Callable[..., Engine]


def small_settings(
    model: Path, *, step_timeout_s: float, plan: ParallelPlan, max_model_len: int = 512, **fields: Any
) -> EngineSettings:
    """For a tiny model in fp32."""
    return EngineSettings(
        engine="e0",
        model_name="tiny",
        model_path=str(model),
        plan=plan,
        dtype="float32",
        device="cpu",
        max_model_len=max_model_len,
        max_batch_tokens=64,
        cache_bytes=1 << 22,
        step_timeout_s=step_timeout_s,
        **fields,
    )


@contextmanager
def engines(folder: Path, settings: Callable[..., EngineSettings]) -> Iterator[StartEngine]:
    """Gives what starts engines of such settings, each in a folder of its own; they all end here."""
    started: list[Engine] = []

    def start_engine(*arguments: Any, **named: Any) -> Engine:
        own = folder / str(len(started))
        own.mkdir()
        started.append(Engine(own, settings(*arguments, **named)))
        return started[-1]

    try:
        yield start_engine
    finally:
        for engine in started:
            engine.end()


def _serve(calls: Connection, settings_path: Path, number: int, log_path: Path) -> None:
    with log_path.open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    logging.basicConfig(level=logging.INFO)
    values = json.loads(settings_path.read_text())
    scheduling = SchedulingSettings(**values["scheduling"])
    settings = EngineSettings(**{**values, "plan": ParallelPlan(**values["plan"]), "scheduling": scheduling})
    rank = Rank(number, settings, SECRET.encode())
    writing = threading.Lock()

    def answer(call: dict[str, Any]) -> None:
        arguments: Sequence[Any] = call["arguments"]
        if call["method"] == "out_of_reach":
            arguments = [[RankAddress(**address) for address in arguments[0]], *arguments[1:]]
        if call["method"] in ("join", "regroup"):
            arguments = [*arguments[:3], [RankAddress(**address) for address in arguments[3]], *arguments[4:]]
        try:
            value = getattr(rank, call["method"])(*arguments)
            is_value = dataclasses.is_dataclass(value) and not isinstance(value, type)
            told = {"value": dataclasses.asdict(value) if is_value else value}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        with writing:
            calls.send_bytes(json.dumps({"number": call["number"], **told}).encode())

    with suppress(EOFError):  # the test has ended
        while True:
            threading.Thread(target=answer, args=(json.loads(calls.recv_bytes()),), daemon=True).start()
