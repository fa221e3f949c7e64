"""Starts Ray's GCS again where it ends alone. With its state on a disk, or in Redis, the new one goes on where the old
one was: nobody else ends, and what ran meanwhile was not disturbed.

    python -m cluster.app.gcs_keeper 6379

watches over the head of this machine whose GCS listens on that port, for as long as its raylet lives.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil

__all__ = ["GcsKeeper", "Head", "find_head"]

log = logging.getLogger(__name__)

_PORT = "--gcs_server_port="
_LOOK_S = 0.5  # how often it sees whether it is to stop
_GRACE_S = 2.0  # `ray stop` ends the raylet a moment before or after
_MOST_BACKOFF_S = 30.0
_SOON_S = 30.0  # a GCS that ends sooner than that after its start is started with growing pauses


@dataclass(frozen=True, slots=True)
class Head:
    """The two processes of a head that all others depend on."""

    gcs: psutil.Process
    raylet: psutil.Process


class GcsKeeper:
    """`port` is where the GCS listens, and each later one will. `on_start` hears of every new one's process id."""

    def __init__(self, head: Head, port: int, on_start: Callable[[int], None] | None = None) -> None:
        self._head = head
        self._on_start = on_start or (lambda pid: None)
        self._command = [f"{_PORT}{port}" if part.startswith(_PORT) else part for part in head.gcs.cmdline()]
        self._environment = head.gcs.environ()
        self._started: subprocess.Popen[bytes] | None = None

    @property
    def keeps_state(self) -> bool:
        """Whether a new GCS would know what the old one knew. One that does not would end everything that lives."""
        redis = any(part.startswith("--redis_address=") and part[-1] != "=" for part in self._command)
        return redis or self._environment.get("RAY_gcs_storage") == "rocksdb"

    def watch(self, stop: threading.Event) -> None:
        """Until `stop` is set, or the raylet ends: then a GCS that was started here ends, too."""
        backoff_s = 0.0
        pid = self._head.gcs.pid
        try:
            while True:
                ended = _first_to_end((pid, self._head.raylet.pid), stop, None)
                if ended != pid or _first_to_end((self._head.raylet.pid,), stop, _GRACE_S + backoff_s) is not None:
                    return
                if stop.is_set():
                    return
                pid = self._start(pid)
                lived = _first_to_end((pid, self._head.raylet.pid), stop, _SOON_S)
                backoff_s = min(_MOST_BACKOFF_S, 2 * backoff_s + 1.0) if lived == pid else 0.0
        finally:
            if self._started is not None and not stop.is_set():
                self._started.terminate()
                self._started.wait()

    def _start(self, ended: int) -> int:
        log.warning("Ray's GCS, process %d, has ended: starting it again", ended)
        if self._started is not None:
            self._started.wait()
        self._started = subprocess.Popen(  # noqa: S603  # as Ray had started it
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._on_start(self._started.pid)
        return self._started.pid


def _first_to_end(pids: Iterable[int], stop: threading.Event, timeout_s: float | None) -> int | None:
    """The process that ended first; None where `stop` was set before, or none did in time. Reaps nobody's child."""
    waiting: dict[int, int] = {}
    with contextlib.ExitStack() as opened:
        poll = select.poll()
        for pid in pids:
            try:
                waiting[file := os.pidfd_open(pid)] = pid
            except ProcessLookupError:
                return pid
            opened.callback(os.close, file)
            poll.register(file, select.POLLIN)
        left_s = timeout_s
        while not stop.is_set():
            look_s = _LOOK_S if left_s is None else min(_LOOK_S, left_s)
            if ready := poll.poll(1000 * look_s):
                return waiting[ready[0][0]]
            if left_s is not None and (left_s := left_s - look_s) <= 0:
                return None
    return None


def find_head(processes: Iterable[psutil.Process], port: int | None = None) -> Head | None:
    """The head among these, where one of them is: the one whose GCS listens on `port`, or the first."""
    gcs, raylets = None, []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet":
                raylets.append(process)
            elif process.name() == "gcs_server" and (port is None or f"{_PORT}{port}" in process.cmdline()):
                gcs = gcs or process
    if gcs is None:
        return None
    session = _session(gcs)
    return next((Head(gcs, raylet) for raylet in raylets if _session(raylet) == session), None)


def _session(process: psutil.Process) -> str | None:
    """Ray's name for all that belongs together."""
    names = [
        part.partition("=")[2]
        for part in process.cmdline()
        if part.lstrip("-").startswith(("session-name=", "session_name="))
    ]
    return names[0] if names else None


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    port = int(sys.argv[1])
    head = find_head(psutil.process_iter(), port)
    if head is None:
        log.error("no head of Ray whose GCS listens on port %d runs here", port)
        return 1
    keeper = GcsKeeper(head, port)
    if not keeper.keeps_state:
        log.error("this GCS keeps its state in memory: set RAY_gcs_storage=rocksdb, or RAY_REDIS_ADDRESS, for the head")
        return 1
    log.info("watching over the GCS, process %d", head.gcs.pid)
    keeper.watch(threading.Event())
    log.info("the head has ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
