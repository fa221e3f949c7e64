"""A heap from which any member can be taken out."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

from scheduler.policy import OrderKey

__all__ = ["RemovableHeap"]

T = TypeVar("T", bound=Hashable)


class RemovableHeap(Generic[T]):
    """Members by key, the smallest first and equal keys in the order they came. Every operation is O(log n) amortised.

    A member that is taken out leaves an empty entry behind; the heap is rebuilt when most of its entries are empty.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[OrderKey, int]] = []
        self._items: dict[int, T] = {}  # by ticket; an entry whose ticket is missing is empty
        self._tickets: dict[T, int] = {}
        self._next_ticket = count()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: T) -> bool:
        return item in self._tickets

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def push(self, key: OrderKey, item: T) -> None:
        assert item not in self._tickets
        ticket = next(self._next_ticket)
        self._items[ticket] = item
        self._tickets[item] = ticket
        heapq.heappush(self._entries, (key, ticket))

    def peek(self) -> tuple[OrderKey, T] | None:
        """The smallest key and its member."""
        while self._entries:
            key, ticket = self._entries[0]
            if ticket in self._items:
                return key, self._items[ticket]
            heapq.heappop(self._entries)
        return None

    def discard(self, item: T) -> bool:
        """Take a member out; False where it is none."""
        ticket = self._tickets.pop(item, None)
        if ticket is None:
            return False
        del self._items[ticket]
        if len(self._entries) > 2 * len(self._items) + 64:
            self._entries = [entry for entry in self._entries if entry[1] in self._items]
            heapq.heapify(self._entries)
        return True
