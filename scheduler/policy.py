"""Who goes first: pure functions of a request."""

from __future__ import annotations

import math
from collections.abc import Callable

from scheduler.request import Request

__all__ = ["Order", "OrderKey", "priority_then_arrival", "priority_then_deadline"]

OrderKey = tuple[float, ...]
Order = Callable[[Request], OrderKey]
"""The smaller key is admitted first and preempted last. It must not change while the request is open."""


def priority_then_arrival(request: Request) -> OrderKey:
    """First come, first served within a priority."""
    return (request.priority, request.arrival_s)


def priority_then_deadline(request: Request) -> OrderKey:
    """The most urgent first within a priority; those without a deadline come last, in order of arrival."""
    deadline_s = math.inf if request.deadline_s is None else request.deadline_s
    return (request.priority, deadline_s, request.arrival_s)
