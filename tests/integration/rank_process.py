"""Ranks in processes of their own, each behind a pipe that calls its methods.

    python -m tests.integration.rank_process SETTINGS.json RANK SECRET

reads one JSON call per line (`{"method": ..., "arguments": [...]}`) and answers one JSON line per call.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers.parallel.groups import HostedStore, host_store
from workers.parallel.plan import ParallelPlan
from workers.rank import Rank, RankAddress
from workers.settings import EngineSettings

__all__ = ["HOST", "SECRET", "Engine", "RankProcess"]

HOST = "127.0.0.1"
SECRET = "not much of a secret"
_ROOT = Path(__file__).parents[2]


class RankProcess:
    """One rank in a child process."""

    def __init__(self, folder: Path, settings: EngineSettings, rank: int) -> None:
        path = folder / f"settings-{rank}.json"
        path.write_text(json.dumps(dataclasses.asdict(settings)))
        self.log_path = folder / f"rank-{rank}.log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.rank_process", str(path), str(rank), SECRET],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=_ROOT,
                text=True,
            )

    def call(self, method: str, *arguments: object) -> Any:
        """Raises RuntimeError with what the rank raised."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the rank has died:\n{self.log_path.read_text()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def end(self) -> None:
        """Kills what is left of it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Engine:
    """All ranks of an engine, led from the test."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        self.settings = settings
        self._store: HostedStore | None = None
        self.ranks = [RankProcess(folder, settings, rank) for rank in range(settings.plan.num_ranks)]

    def start(self, generation: int = 1) -> list[str]:
        """Open to start; the session addresses of the DP groups."""
        self._store = host_store(HOST)
        addresses = self.on_all("open", HOST)
        self.on_all("join", generation, HOST, self._store.port, addresses)
        self.on_all("load")
        return [address for address in self.on_all("start") if address]

    def on_all(self, method: str, *arguments: object) -> list[Any]:
        """Calls all ranks at once, as many steps of their life demand."""
        values: list[Any] = [None] * len(self.ranks)
        errors: list[Exception] = []

        def one(index: int) -> None:
            try:
                values[index] = self.ranks[index].call(method, *arguments)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(self.ranks))]
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


def _serve(settings_path: str, number: str, secret: str) -> None:
    # Only answers may go to the pipe; whatever libraries print goes to the log.
    answers = sys.stdout
    sys.stdout = sys.stderr
    values = json.loads(Path(settings_path).read_text())
    settings = EngineSettings(**{**values, "plan": ParallelPlan(**values["plan"])})
    rank = Rank(int(number), settings, secret.encode())
    for line in sys.stdin:
        call = json.loads(line)
        arguments: Sequence[Any] = call["arguments"]
        if call["method"] == "join":
            arguments = [*arguments[:3], [RankAddress(**address) for address in arguments[3]]]
        try:
            value = getattr(rank, call["method"])(*arguments)
            is_value = dataclasses.is_dataclass(value) and not isinstance(value, type)
            answer = {"value": dataclasses.asdict(value) if is_value else value}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO)
    _serve(*sys.argv[1:])
