"""The queue in front of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from scheduler.heap import RemovableHeap
from scheduler.sequence import Sequence

__all__ = ["Ledger", "OrderedQueue", "WaitingQueue"]


class WaitingQueue(Protocol):
    """Waiting and preempted sequences.

    `peek` names the sequence to admit next. One that must wait for blocks is not overtaken for ever by small ones:
    whatever the order is, each member comes to stand first, and stays there while nothing more urgent is pushed. It is
    None where none is left that may run beside what runs already.
    """

    def push(self, sequence: Sequence) -> None: ...

    def peek(self) -> Sequence | None: ...

    def remove(self, sequence: Sequence) -> None: ...

    def ahead_of(self, sequence: Sequence) -> tuple[int, int]:
        """How many members are expected to go before this one, and how many tokens they are."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...

    @property
    def num_tokens(self) -> int:
        """Tokens to prefill."""
        ...


@runtime_checkable
class Ledger(Protocol):
    """A queue that keeps account of what its members get once they run."""

    def refusal(self, sequence: Sequence) -> str | None: ...

    def admitted(self, sequence: Sequence, num_tokens: int) -> None: ...

    def served(self, sequences: Iterable[Sequence]) -> None: ...

    def left(self, sequence: Sequence) -> None: ...


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
        assert removed, f"{sequence.key} is not in the queue"
        self._num_tokens -= len(sequence.token_ids)

    def ahead_of(self, sequence: Sequence) -> tuple[int, int]:
        lengths = [len(other.token_ids) for other in self._heap if other.order < sequence.order]
        return len(lengths), sum(lengths)
