"""An exchange between ranks that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from workers.parallel.dispatch import Meanwhile

__all__ = ["Table", "ThreadExchange", "on_threads"]

T = TypeVar("T")


class Table:
    """Where threads put what they send; a barrier on both sides of every exchange."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=10)
        self.sent: list[list[torch.Tensor]] = [[] for _ in range(size)]

    def exchange(self, index: int, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.sent[index] = list(parts)
        self.barrier.wait()
        received = [self.sent[other][index].clone() for other in range(self.size)]
        self.barrier.wait()
        return received


class ThreadExchange:
    kind = "threads"

    def __init__(self, table: Table, index: int) -> None:
        self._table = table
        self.size = table.size
        self.index = index

    def counted_rows(
        self, x: torch.Tensor, counts: torch.Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if meanwhile is not None:
            meanwhile()
        arrived = torch.stack(self._table.exchange(self.index, list(counts)))
        return self.rows(x, counts.sum(dim=1).tolist(), arrived.sum(dim=1).tolist()), arrived

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        received = self._table.exchange(self.index, torch.split(x, list(send)))
        assert [len(part) for part in received] == list(receive)
        return torch.cat(received)

    def hang_up(self) -> None:
        self._table.barrier.abort()

    def close(self) -> None:
        pass


def on_threads(ranks: int, work: Callable[[int], T]) -> list[T]:
    """What `work` returns for each rank, all at once; raises what one of them raises."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def call(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(ranks)]
