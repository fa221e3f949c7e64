"""Who goes first: pure functions of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from scheduler.request import Request

__all__ = ["ORDERS", "Order", "OrderKey", "priority_then_arrival", "priority_then_deadline"]

_PATIENCE_S = 120.0

OrderKey = tuple[float, ...]
Order = Callable[[Request], OrderKey]
"""The smaller key is admitted first and preempted last. It must not change while the request is open."""


def priority_then_arrival(request: Request) -> OrderKey:
    """First come, first served within a priority."""
    return (request.priority, request.arrival_s)


def priority_then_deadline(request: Request) -> OrderKey:
    """The most urgent first within a priority.

    One without a deadline goes as if it had two minutes, so that it does not wait for ever.
    """
    deadline_s = request.arrival_s + _PATIENCE_S if request.deadline_s is None else request.deadline_s
    return (request.priority, deadline_s, request.arrival_s)


ORDERS: Mapping[str, Order] = {"arrival": priority_then_arrival, "deadline": priority_then_deadline}
"""By the name used in the configuration."""
