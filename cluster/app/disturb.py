"""Harms one process of this node on purpose. Run as a script of its own, so that it outlives whoever asked for it:

    python -m cluster.app.disturb kill|freeze|slow DURATION_S SHARE PID START

It goes on as a child of nobody: Ray ends what its workers leave behind. START is when the process was started, as
`guard` has it: a later one of the same id is left alone. Whatever happens, a process that still lives at the end is
running again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

from cluster.app.guard import start_time

__all__ = ["FIRST_S", "go_on_alone"]

FIRST_S = 0.05
"""So that who asked has its answer, even if it is the one that is hit."""
_PERIOD_S = 0.1


def go_on_alone() -> None:
    """In a child of nobody, with streams of its own: who asked waits for this process and its streams."""
    if os.fork():
        os._exit(0)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)


def disturb(pid: int, started: str, fault: str, duration_s: float, share: float) -> None:
    time.sleep(FIRST_S)
    if start_time(pid) != started:
        return
    if fault == "kill":
        os.kill(pid, signal.SIGKILL)
        return
    end_s = time.monotonic() + duration_s
    try:
        while (left_s := end_s - time.monotonic()) > 0 and start_time(pid) == started:
            os.kill(pid, signal.SIGSTOP)
            if fault == "freeze":
                time.sleep(left_s)
            else:
                time.sleep(_PERIOD_S * share)
                os.kill(pid, signal.SIGCONT)
                time.sleep(_PERIOD_S * (1 - share))
    finally:
        if start_time(pid) == started:
            os.kill(pid, signal.SIGCONT)


def main() -> None:
    fault, duration_s, share, pid, started = sys.argv[1:]
    go_on_alone()
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        disturb(int(pid), started, fault, float(duration_s), float(share))


if __name__ == "__main__":
    main()
