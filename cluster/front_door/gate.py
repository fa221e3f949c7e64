"""Who may come in: the front door's bounds on what is open at once."""

from __future__ import annotations

from cluster.front_door.errors import InvalidRequest, Overloaded
from cluster.front_door.groups import Clock
from cluster.front_door.limits import Limits
from cluster.front_door.metrics import FrontDoorMetrics
from scheduler.admission import AdmissionLimits, OpenLoad, admit

__all__ = ["Gate"]

_RATE_WINDOW_S = 1.0


class Gate:
    """Counts what is open and asks `scheduler.admission`. A call comes in first, and says then what it costs."""

    def __init__(self, limits: Limits, metrics: FrontDoorMetrics, clock: Clock) -> None:
        self._limits = AdmissionLimits(
            max_open_requests=limits.max_open_requests,
            max_open_tokens=limits.max_open_tokens,
            background_share=limits.background_share,
        )
        self._metrics = metrics
        self._clock = clock
        self._num_requests = 0
        self._num_tokens = 0
        self._measured_s = clock.time()
        self._measured_tokens = 0
        self._tokens_per_s = 0.0

    def enter(self, priority: int, cost_tokens: int = 0) -> None:
        """Takes a call in, with what is known of its cost. Raises Overloaded."""
        self._check(self._num_requests, max(cost_tokens, 1), priority)
        self._num_requests += 1
        self._num_tokens += cost_tokens

    def weigh(self, priority: int, cost_tokens: int) -> None:
        """The cost of a call that came in without. Raises Overloaded, or InvalidRequest where it can never fit."""
        self._check(self._num_requests - 1, cost_tokens, priority)
        self._num_tokens += cost_tokens

    def leave(self, cost_tokens: int) -> None:
        """A call with this cost has gone."""
        self._num_requests -= 1
        self._num_tokens -= cost_tokens

    def _check(self, num_requests: int, cost_tokens: int, priority: int) -> None:
        load = OpenLoad(num_requests=num_requests, num_tokens=self._num_tokens, tokens_per_s=self._rate())
        verdict = admit(self._limits, load, cost_tokens, priority=priority)
        if verdict.admitted:
            return
        if verdict.retry_after_s is None:
            raise InvalidRequest(verdict.reason, field="max_tokens")
        raise Overloaded(verdict.reason, retry_after_s=verdict.retry_after_s)

    def _rate(self) -> float:
        """Tokens per second since the last look, looked at no more often than once in a window."""
        now_s, tokens = self._clock.time(), self._metrics.num_answer_tokens
        if (elapsed_s := now_s - self._measured_s) >= _RATE_WINDOW_S:
            self._tokens_per_s = (tokens - self._measured_tokens) / elapsed_s
            self._measured_s, self._measured_tokens = now_s, tokens
        return self._tokens_per_s
