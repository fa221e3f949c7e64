"""Peers and sources in processes of their own: each prints its address, and serves until its input ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

__all__ = ["child"]


@contextmanager
def child(module: str, *arguments: str, start_timeout_s: float = 120.0, stop_timeout_s: float = 30.0) -> Iterator[str]:
    """Runs `python -m module` and yields the last word of the line it prints when it serves.

    Raises RuntimeError where it ends, or says nothing, instead.
    """
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield _ready_line(process, start_timeout_s).split()[-1]
    finally:
        process.stdin.close()
        try:
            process.wait(stop_timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _ready_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    assert process.stdout is not None
    impatience = Timer(timeout_s, process.kill)
    impatience.start()
    try:
        for line in process.stdout:
            if line.startswith("ready "):
                return line
    finally:
        impatience.cancel()
    raise RuntimeError(f"{process.args!r} ended with status {process.wait()} before it served")
