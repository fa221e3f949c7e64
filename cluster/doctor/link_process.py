"""One end of a measurement between two machines, in a process that can be ended."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.parallel.link_probe import LinkFigures, ProbeOrder

__all__ = ["LinkProblem", "LinkProcess"]


class LinkProblem(Exception):
    """The two ends did not meet; in one line."""


class LinkProcess:
    """`workers.parallel.link_probe` in a process; it is killed by whoever lets go of it."""

    def __init__(self, order: ProbeOrder) -> None:
        self._give_up_s = time.monotonic() + order.timeout_s
        self._timeout_s = order.timeout_s
        self._process = subprocess.Popen(  # noqa: S603  # ours
            [sys.executable, "-m", "workers.parallel.link_probe", json.dumps(asdict(order))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def port(self) -> int:
        """Of the first end."""
        return int(json.loads(self._line())["port"])

    def figures(self) -> LinkFigures:
        from workers.parallel.link_probe import LinkFigures

        return LinkFigures(**json.loads(self._line()))

    def close(self) -> None:
        """Safe to repeat."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _line(self) -> str:
        try:
            line = self._lines.get(timeout=max(0.0, self._give_up_s - time.monotonic()))
        except queue.Empty:
            raise LinkProblem(f"no handshake in {self._timeout_s:g} s") from None
        if line:
            return line
        assert self._process.stderr is not None
        said = self._process.stderr.read().strip().splitlines()
        raise LinkProblem(said[-1] if said else f"the measuring process ended with {self._process.wait()}")
