"""The queue in front of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from scheduler.heap import RemovableHeap
from scheduler.sequence import Sequence

__all__ = ["OrderedQueue", "WaitingQueue"]


class WaitingQueue(Protocol):
    """Waiting and preempted sequences. Another implementation may share the batch fairly among tenants.

    `peek` names the sequence to admit next and keeps naming it until it is removed or something is pushed: a large
    sequence that must wait for blocks is not overtaken for ever by small ones.
    """

    def push(self, sequence: Sequence) -> None: ...

    def peek(self) -> Sequence | None: ...

    def remove(self, sequence: Sequence) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...

    @property
    def num_tokens(self) -> int:
        """Tokens to prefill."""
        ...


class OrderedQueue:
    """In the order of the sequences' keys."""

    def __init__(self) -> None:
        self._heap: RemovableHeap[Sequence] = RemovableHeap()
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._heap)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def push(self, sequence: Sequence) -> None:
        self._heap.push(sequence.order, sequence)
        self._num_tokens += len(sequence.token_ids)

    def peek(self) -> Sequence | None:
        head = self._heap.peek()
        return None if head is None else head[1]

    def remove(self, sequence: Sequence) -> None:
        removed = self._heap.discard(sequence)
        assert removed, f"{sequence.request.key} is not in the queue"
        self._num_tokens -= len(sequence.token_ids)
