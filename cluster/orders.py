"""What administrators ask for, on its way from a front door to whoever carries it out, and the news on the way back.

Only one thing is done at a time: operations change the same engines. Nothing is kept on disk: an order that the roster
forgets with its process is to be given again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["News", "Order", "Orders"]

_MAX_KEPT = 32

State = Literal["running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Order:
    """`request` is a serialized DrainRequest, ScaleRequest or RolloutRequest, as `kind` says."""

    number: int
    kind: Literal["drain", "scale", "rollout"]
    request: bytes


@dataclass(frozen=True, slots=True)
class News:
    """One line of how an order goes; "done" and "failed" are the last."""

    state: State
    line: str


@dataclass(slots=True)
class _Known:
    order: Order
    news: list[News] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return bool(self.news) and self.news[-1].state != "running"


class Orders:
    """The queue and what is known of each order."""

    def __init__(self) -> None:
        self._waiting: deque[Order] = deque()
        self._known: dict[int, _Known] = {}
        self._next = 1

    def give(self, kind: Literal["drain", "scale", "rollout"], request: bytes) -> int:
        """Returns the order's number."""
        order = Order(self._next, kind, request)
        self._next += 1
        self._waiting.append(order)
        self._known[order.number] = _Known(order)
        over = [number for number, known in self._known.items() if known.over]
        for number in over[:-_MAX_KEPT]:
            del self._known[number]
        return order.number

    def take(self) -> Order | None:
        """The next one to be carried out."""
        return self._waiting.popleft() if self._waiting else None

    def tell(self, number: int, news: News) -> None:
        """How an order goes."""
        if number in self._known:
            self._known[number].news.append(news)

    def news(self, number: int, after: int) -> tuple[News, ...] | None:
        """What there is behind the first `after` lines; None of an order that nobody knows."""
        known = self._known.get(number)
        return None if known is None else tuple(known.news[after:])
