"""A thread that runs steps beside the one that plans them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Beside"]

T = TypeVar("T")


class Beside(Generic[T]):
    """One piece of work at a time: `begin` it, do something else, and `end` it. Both belong to one thread."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], T] | None] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[tuple[T] | Exception] = queue.SimpleQueue()
        # A daemon: work that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], T]) -> None:
        self._work.put(work)

    def end(self) -> T:
        """Waits for what was begun; raises what it raised."""
        end = self._ends.get()
        if isinstance(end, Exception):
            raise end
        return end[0]

    def close(self) -> None:
        """Ends the thread after the work in progress, and waits for it."""
        self._work.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._ends.put((work(),))
            except Exception as error:
                self._ends.put(error)
