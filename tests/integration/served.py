"""`shoal serve` as a user runs it: a process of its own, free ports, and the processes that it starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import grpc
import psutil

from cluster.app.ports import free_port
from protos.shoal.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

__all__ = ["SHOAL", "Served", "eventually", "run_shoal", "serving"]

SHOAL = [sys.executable, "-c", "from cluster.cli import main; main()"]
START_TIMEOUT_S = 120.0


def eventually(holds: Callable[[], bool], what: str, *, timeout_s: float = 60.0) -> None:
    """Waits until something in other processes is so."""
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def run_shoal(*arguments: str, timeout_s: float = START_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run([*SHOAL, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes], port: int, http_port: int) -> None:
        self.process = process
        self.port = port
        self.http_port = http_port
        self._output = output
        self._known: dict[int, psutil.Process] = {}
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)

    @property
    def output(self) -> str:
        return Path(self._output.name).read_text(errors="replace")

    def wait_until_ready(self) -> None:
        eventually(
            lambda: "\nready after" in self.output or self.process.poll() is not None,
            "ready",
            timeout_s=START_TIMEOUT_S,
        )
        assert self.process.poll() is None, self.output

    def status(self, *, api_key: str = "") -> admin_pb2.StatusResponse:
        metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        stub = admin_pb2_grpc.AdminStub(self.channel)
        return stub.Status(admin_pb2.StatusRequest(), timeout=60, metadata=metadata)

    def stream(self, text: str, **sampling: object) -> Iterator[inference_pb2.GenerateChunk]:
        """Greedy unless told otherwise."""
        params = inference_pb2.SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
        return iter(self.inference.Generate(inference_pb2.GenerateRequest(text=text, sampling=params), timeout=120))

    def tokens(self, text: str, **sampling: object) -> list[int]:
        return collect(self.stream(text, **sampling))

    def note_processes(self) -> list[psutil.Process]:
        """Everything that the server has started by now; what was ever noted must be gone in the end."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._known.setdefault(process.pid, process)
        return list(self._known.values())

    def interrupt(self) -> None:
        """Ctrl-C, which a terminal sends to the whole process group."""
        self.note_processes()
        os.killpg(self.process.pid, signal.SIGINT)

    def expect_nothing_left(self, *, timeout_s: float = 60.0) -> None:
        """No process, no listener, no folder."""
        _, alive = psutil.wait_procs(list(self._known.values()), timeout=timeout_s)
        assert not alive, f"still there: {[process.cmdline() for process in alive]}"
        assert len(self._known) > 5, "the processes were noted"
        for port in (self.port, self.http_port):
            with socket.socket() as client:
                assert client.connect_ex(("127.0.0.1", port)) != 0, f"somebody still listens on {port}"


def collect(stream: Iterator[inference_pb2.GenerateChunk]) -> list[int]:
    """The tokens of a stream, whose positions must be without a gap or a repetition."""
    tokens: list[int] = []
    for chunk in stream:
        assert chunk.position == len(tokens), "every token once, in order"
        tokens.extend(chunk.token_ids)
    return tokens


@contextmanager
def serving(
    model: Path, *options: str, config: str = "", cache: str | None = "resources: {cache_size: 32MiB}"
) -> Iterator[Served]:
    """A ready server. At the end it is killed with all it started, if the test has left it running.

    A small cache unless told otherwise: what is mostly looked at here is processes.
    """
    port, http_port = (free_port("127.0.0.1", 0, key="", option="") for _ in range(2))
    with tempfile.TemporaryDirectory(prefix="served-") as folder:
        path = Path(folder) / "shoal.yaml"
        path.write_text(f"{cache or ''}\n{config}")
        command = [*SHOAL, "serve", "--model-path", str(model), "--config", str(path)]
        command += ["--port", str(port), "--http-port", str(http_port), *options]
        with (Path(folder) / "output").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            served = Served(process, output, port, http_port)
            try:
                served.wait_until_ready()
                served.note_processes()
                yield served
            finally:
                served.channel.close()
                leftovers = served.note_processes() if process.poll() is None else []
                process.kill()
                process.wait()
                for leftover in leftovers:
                    if leftover.is_running():
                        leftover.kill()
