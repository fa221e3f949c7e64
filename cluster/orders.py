"""What administrators ask for, on its way from a front door to whoever carries it out, and the news on the way back.

Only one thing is done at a time: operations change the same engines. What `kept` gives can be handed to the next
`Orders`: an order under way goes on when the roster's process dies, and who waits for its news hears the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ConfigDict

__all__ = ["KeptOrder", "News", "Order", "Orders"]

_MAX_KEPT = 32

State = Literal["running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Order:
    """`request` is a serialized DrainRequest, ScaleRequest or RolloutRequest, as `kind` says."""

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    number: int
    kind: Literal["drain", "scale", "rollout"]
    request: bytes


@dataclass(frozen=True, slots=True)
class News:
    """One line of how an order goes; "done" and "failed" are the last."""

    state: State
    line: str


@dataclass(frozen=True, slots=True)
class KeptOrder:
    """An order, whether somebody carries it out, and what was heard of it."""

    order: Order
    taken: bool = False
    news: tuple[News, ...] = ()

    @property
    def over(self) -> bool:
        return bool(self.news) and self.news[-1].state != "running"


class Orders:
    """The queue and what is known of each order."""

    def __init__(self, kept: Sequence[KeptOrder] = ()) -> None:
        self._known = {each.order.number: each for each in kept}
        self._next = max(self._known, default=0) + 1

    def kept(self) -> tuple[KeptOrder, ...]:
        """All that is known, for another `Orders`."""
        return tuple(self._known.values())

    def give(self, kind: Literal["drain", "scale", "rollout"], request: bytes) -> int:
        """Returns the order's number."""
        order = Order(self._next, kind, request)
        self._next += 1
        self._known[order.number] = KeptOrder(order)
        over = [number for number, known in self._known.items() if known.over]
        for number in over[:-_MAX_KEPT]:
            del self._known[number]
        return order.number

    def take(self) -> Order | None:
        """The next one to be carried out."""
        for number, known in self._known.items():
            if not known.taken:
                self._known[number] = replace(known, taken=True)
                return known.order
        return None

    def tell(self, number: int, news: News) -> None:
        """How an order goes."""
        if (known := self._known.get(number)) is not None:
            self._known[number] = replace(known, news=(*known.news, news))

    def news(self, number: int, after: int) -> tuple[News, ...] | None:
        """What there is behind the first `after` lines; None of an order that nobody knows."""
        known = self._known.get(number)
        return None if known is None else known.news[after:]
