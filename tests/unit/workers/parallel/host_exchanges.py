"""Host exchanges between threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.unit.workers.thread_exchange import on_threads
from workers.parallel.host_exchange import HostExchange
from workers.parallel.host_meeting import meet

__all__ = ["MemoryBoard", "host_exchanges", "meet_all"]


class MemoryBoard:
    """A store in this process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 10), key
            return self._values[key].encode()


def meet_all(members: Sequence[int], *, step_timeout_s: float = 10.0) -> list[HostExchange | str]:
    board = MemoryBoard()
    return on_threads(
        len(members),
        lambda index: meet(
            board, members[index], members, generation=3, join_timeout_s=5, step_timeout_s=step_timeout_s
        ),
    )


@contextmanager
def host_exchanges(ranks: int, *, step_timeout_s: float = 10.0) -> Iterator[list[HostExchange]]:
    found = meet_all(range(ranks), step_timeout_s=step_timeout_s)
    exchanges = [exchange for exchange in found if isinstance(exchange, HostExchange)]
    assert len(exchanges) == ranks, found
    try:
        yield exchanges
    finally:
        for exchange in exchanges:
            exchange.close()
