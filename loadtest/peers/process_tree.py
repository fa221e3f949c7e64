"""A command and everything it started, wherever that has gone since: memory, CPU time, and a clean end."""

from __future__ import annotations

import subprocess
import threading
from dataclasses import dataclass

import psutil

__all__ = ["MemoryPeak", "MemorySampler", "ProcessTree"]


class ProcessTree:
    """Remembers each process it has seen, so that one whose parent died is still counted."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._seen: dict[int, psutil.Process] = {process.pid: psutil.Process(process.pid)}
        self._lock = threading.Lock()

    def alive(self) -> list[psutil.Process]:
        """Every process of the tree that runs now."""
        with self._lock:
            for process in list(self._seen.values()):
                try:
                    children = process.children(recursive=True)
                except psutil.NoSuchProcess:
                    continue
                for child in children:
                    self._seen.setdefault(child.pid, child)
            return [process for process in self._seen.values() if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The highest sums over the tree, each at its own moment.

    RSS counts a page that several processes share once for each; PSS (proportional set size) shares it out, so its
    sum is what the machine really gave.
    """

    rss_bytes: int
    pss_bytes: int
    num_processes: int


class MemorySampler:
    """Samples a tree's memory from a thread, as a context manager. Costs some CPU: not while timing."""

    def __init__(self, tree: ProcessTree, interval_s: float = 0.5) -> None:
        self._tree = tree
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler")
        self._peak = MemoryPeak(0, 0, 0)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak(self) -> MemoryPeak:
        return self._peak

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self._interval_s)

    def sample(self) -> None:
        """Takes one sample now."""
        rss = pss = count = 0
        for process in self._tree.alive():
            try:
                memory = process.memory_full_info()
            except psutil.NoSuchProcess:
                continue
            rss += memory.rss
            pss += memory.pss
            count += 1
        peak = self._peak
        self._peak = MemoryPeak(max(peak.rss_bytes, rss), max(peak.pss_bytes, pss), max(peak.num_processes, count))
