"""Ends what a killed `shoal serve` leaves behind: Ray's agents do not notice that their raylet was killed.

Run as a script of its own, with the folder of the run as its argument. Its input is a line `PID START` for each
process to be ended, START as /proc has it, and in a run that ended well the line `done`. The end of the input is the
end of whoever wrote it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

_PATIENCE_S = 3.0  # for those that end by themselves


def start_time(pid: int) -> str:
    """When the process was started, which tells it from a later one of the same id; empty where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def main() -> None:
    known: list[tuple[int, str]] = []
    for line in sys.stdin:
        if line.strip() == "done":
            return
        pid, started = line.split()
        known.append((int(pid), started))
    give_up_s = time.monotonic() + _PATIENCE_S
    while known and time.monotonic() < give_up_s:
        time.sleep(0.1)
        known = [(pid, started) for pid, started in known if start_time(pid) == started]
    for pid, _ in known:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
