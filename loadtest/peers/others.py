"""Whether a turn had the machine to itself."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil

__all__ = ["OtherCpu", "own_tree"]


def own_tree() -> list[psutil.Process]:
    """This process and everything it started."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


class OtherCpu:
    """How many cores all processes but `mine` keep busy, from its making to a call of `cores`."""

    def __init__(self, mine: Sequence[psutil.Process]) -> None:
        self._mine = mine
        self._started_s = time.perf_counter()
        self._busy_s, self._mine_s = _busy_s(), _used_s(mine)

    def cores(self) -> float:
        busy_s = _busy_s() - self._busy_s - (_used_s(self._mine) - self._mine_s)
        # Both sides are counted in ticks of the kernel, so a quiet machine may come out a little below nothing.
        return max(0.0, busy_s) / (time.perf_counter() - self._started_s)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _used_s(processes: Sequence[psutil.Process]) -> float:
    total_s = 0.0
    for process in processes:
        times = process.cpu_times()
        total_s += times.user + times.system
    return total_s
