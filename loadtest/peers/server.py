"""`make serve`, or `shoal serve`, as a user runs it: started, asked for its first token, ended with Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from loadtest.peers.ports import free_port
from loadtest.peers.process_tree import ProcessTree
from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc as rpc

__all__ = ["DEFAULT_MODEL", "Server", "serving"]

ROOT = Path(__file__).parents[2]
DEFAULT_MODEL = Path.home() / ".cache/shoal/models/smollm2-135m"
_SHOAL = (sys.executable, "-c", "from cluster.cli import main; main()")
_RETRY_S = 0.02
_STOP_TIMEOUT_S = 60.0
_LOG_TAIL = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A server that has answered with a token."""

    address: str
    http_url: str
    command: str
    first_token_s: float  # since the command was given
    tree: ProcessTree


@contextmanager
def serving(*arguments: str, config: str | None = None, start_timeout_s: float = 600.0) -> Iterator[Server]:
    """Runs `make serve` on free ports from its start to its end; with a `config` (YAML), `shoal serve` with that.

    Raises RuntimeError with the end of its output where it ends early or gives no token in time, or where
    anything of it is still alive after Ctrl-C.
    """
    port, http_port = free_port(), free_port()
    options = [*arguments, f"--port {port} --http-port {http_port}"]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        if config is None:
            command = ["make", "serve", f"ARGS={' '.join(options)}"]
            shown = f"make serve ARGS='{' '.join(options)}'"
        else:
            path = Path(folder) / "shoal.yaml"
            path.write_text(config, encoding="utf-8")
            command = [*_SHOAL, "serve", *" ".join([*options, f"--config {path}"]).split()]
            shown = f"shoal serve {' '.join(options)}"
        started_s = time.perf_counter()
        # A process group of its own is what a terminal would give it, and what Ctrl-C goes to.
        process = subprocess.Popen(  # noqa: S603
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        tree = ProcessTree(process)
        try:
            first_s = _first_token(process, f"127.0.0.1:{port}", started_s + start_timeout_s)
            if first_s is None:
                raise RuntimeError(f"{' '.join(command)} gave no token:\n{_tail(log.fileno())}")
            yield Server(
                address=f"127.0.0.1:{port}",
                http_url=f"http://127.0.0.1:{http_port}",
                command=shown.replace(str(Path.home()), "~"),
                first_token_s=first_s - started_s,
                tree=tree,
            )
        finally:
            _end(process, tree)


def _first_token(process: subprocess.Popen[bytes], address: str, deadline_s: float) -> float | None:
    """When a token came, asking again as long as the server runs and says that it is not ready."""
    request = pb.GenerateRequest(text="Hello", sampling=pb.SamplingParams(max_tokens=1, ignore_eos=True))
    # A channel that has failed to connect waits longer and longer; the time to be measured is the server's.
    options = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 20)]
    options.append(("grpc.min_reconnect_backoff_ms", 20))
    with grpc.insecure_channel(address, options=options) as channel:
        stub = rpc.InferenceStub(channel)
        while time.perf_counter() < deadline_s:
            if process.poll() is not None:
                return None
            try:
                for chunk in stub.Generate(request, timeout=30.0):
                    if chunk.token_ids:
                        return time.perf_counter()
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
            time.sleep(_RETRY_S)
    return None


def _end(process: subprocess.Popen[bytes], tree: ProcessTree) -> None:
    alive = tree.alive()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, left = psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)
    left = list({child.pid: child for child in [*left, *tree.alive()]}.values())
    for child in left:
        child.kill()
    process.wait()
    if left:
        raise RuntimeError(f"still alive {_STOP_TIMEOUT_S:g} s after Ctrl-C, killed: {[c.pid for c in left]}")


def _tail(descriptor: int) -> str:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    start = max(0, size - _LOG_TAIL)
    return os.pread(descriptor, size - start, start).decode(errors="replace")
