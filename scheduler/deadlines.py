"""When open sequences must end: by their own deadline, or because they have waited for too long."""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.heap import RemovableHeap
from scheduler.sequence import Sequence

__all__ = ["Deadlines"]


class Deadlines:
    """`max_queue_s` bounds the time to a sequence's first admission; 0 is no bound."""

    def __init__(self, *, max_queue_s: float) -> None:
        self._max_queue_s = max_queue_s
        self._ends: RemovableHeap[Sequence] = RemovableHeap()
        self._starts: RemovableHeap[Sequence] = RemovableHeap()

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence with a limit, those with two twice."""
        yield from self._ends
        yield from self._starts

    def open(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.deadline_s is not None:
            self._ends.push((request.deadline_s,), sequence)
        if self._max_queue_s:
            self._starts.push((request.arrival_s + self._max_queue_s,), sequence)

    def admitted(self, sequence: Sequence) -> None:
        self._starts.discard(sequence)

    def forget(self, sequence: Sequence) -> None:
        self._ends.discard(sequence)
        self._starts.discard(sequence)

    def expired(self, now_s: float) -> Sequence | None:
        """A sequence whose deadline has passed."""
        return _due(self._ends, now_s)

    def waited_out(self, now_s: float) -> Sequence | None:
        """A sequence that has waited for longer than it may."""
        return _due(self._starts, now_s)


def _due(heap: RemovableHeap[Sequence], now_s: float) -> Sequence | None:
    head = heap.peek()
    return head[1] if head is not None and head[0][0] <= now_s else None
