"""A thread that runs steps beside the one that plans them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from scheduler.plan import StepPlan, StepResult

__all__ = ["Beside", "TimedRun"]

TimedRun = Callable[[StepPlan, str], tuple[StepResult, float]]
"""A plan and a traceparent to the plan's result and how many seconds it took."""


class Beside:
    """One step at a time: `begin` it, do something else, and `end` it. Both belong to one thread."""

    def __init__(self, run: TimedRun) -> None:
        self._run = run
        self._plans: queue.SimpleQueue[tuple[StepPlan, str] | None] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[tuple[StepResult, float] | Exception] = queue.SimpleQueue()
        # A daemon: a step that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._loop, name="steps", daemon=True)
        self._thread.start()

    def begin(self, plan: StepPlan, traceparent: str) -> None:
        self._plans.put((plan, traceparent))

    def end(self) -> tuple[StepResult, float]:
        """Waits for the step that was begun; raises what it raised."""
        end = self._ends.get()
        if isinstance(end, Exception):
            raise end
        return end

    def close(self) -> None:
        """Ends the thread after the step in progress, and waits for it."""
        self._plans.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (begun := self._plans.get()) is not None:
            try:
                self._ends.put(self._run(*begun))
            except Exception as error:
                self._ends.put(error)
