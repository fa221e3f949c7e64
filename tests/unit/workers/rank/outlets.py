"""An outlet that keeps what it hears, and waits for more."""

from __future__ import annotations

import threading
from collections.abc import Callable

from scheduler.plan import Event
from workers.loop import StepBatch

__all__ = ["Recorder"]


class Recorder:
    def __init__(self) -> None:
        self.batches: list[StepBatch] = []
        self.ended = False
        self._changed = threading.Condition()

    @property
    def events(self) -> list[Event]:
        return [event for batch in self.batches for event in batch.events]

    def of(self, key: str) -> list[Event]:
        return [event for event in self.events if event.key == key]

    def finished(self, key: str) -> bool:
        return any(event.finish is not None for event in self.of(key))

    def deliver(self, batch: StepBatch) -> None:
        with self._changed:
            self.batches.append(batch)
            self._changed.notify_all()

    def broken(self) -> None:
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def wait(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(holds, 10), "nothing came"
