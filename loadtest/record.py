"""What a client saw of one request, counted from the moment it was meant to be sent.

A closed-loop client that is kept waiting also asks less, and its percentiles hide the wait ("coordinated
omission"). Here every latency starts at the intended send time, whenever the request really left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.workload import Work

__all__ = ["Clock", "PositionChecker", "Recorder", "RequestRecord", "TokenArrival"]

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class TokenArrival:
    """One message that carried tokens."""

    at_s: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """Times are of one clock, in seconds. `error` is empty where the whole answer came, every token once."""

    door: str
    num_prompt_tokens: int
    intended_s: float
    sent_s: float
    end_s: float
    arrivals: tuple[TokenArrival, ...] = ()
    num_repeated: int = 0
    num_skipped: int = 0
    error: str = ""

    @property
    def num_output_tokens(self) -> int:
        return sum(arrival.num_tokens for arrival in self.arrivals)

    @property
    def send_delay_s(self) -> float:
        """How late the client itself was; large values mean that the load generator is the bottleneck."""
        return self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, None without one."""
        return self.arrivals[0].at_s - self.intended_s if self.arrivals else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first message, None where nothing followed it."""
        num_after = self.num_output_tokens - self.arrivals[0].num_tokens if self.arrivals else 0
        return (self.arrivals[-1].at_s - self.arrivals[0].at_s) / num_after if num_after else None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Inter-token latencies. A message with several tokens counts once, so that bundling hides no stall."""
        return tuple(later.at_s - earlier.at_s for earlier, later in itertools.pairwise(self.arrivals))

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.intended_s


class PositionChecker:
    """Holds each choice to positions 0, 1, 2, ... and counts what was repeated or skipped."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}
        self.num_repeated = 0
        self.num_skipped = 0

    def push(self, index: int, position: int, num_tokens: int) -> None:
        """Takes `num_tokens` of choice `index`, the first of them at `position`."""
        if not num_tokens:
            return
        expected = self._next.get(index, 0)
        self.num_repeated += min(num_tokens, max(0, expected - position))
        self.num_skipped += max(0, position - expected)
        self._next[index] = max(expected, position + num_tokens)

    @property
    def fault(self) -> str:
        """Empty where every position came once."""
        if not self.num_repeated and not self.num_skipped:
            return ""
        return f"positions: {self.num_repeated} repeated, {self.num_skipped} skipped"


class Recorder:
    """Collects one request's record; made at the moment the request is really sent."""

    def __init__(self, door: str, work: Work, intended_s: float, clock: Clock) -> None:
        self._door = door
        self._work = work
        self._intended_s = intended_s
        self._clock = clock
        self._sent_s = clock()
        self._arrivals: list[TokenArrival] = []
        self._positions = PositionChecker()
        self._finished = False

    @property
    def num_tokens(self) -> int:
        return sum(arrival.num_tokens for arrival in self._arrivals)

    def tokens(self, num_tokens: int, *, position: int, index: int = 0) -> None:
        """A message arrived; without tokens it is not counted."""
        if num_tokens:
            self._arrivals.append(TokenArrival(self._clock(), num_tokens))
            self._positions.push(index, position, num_tokens)

    def finish_reason(self) -> None:
        """The server said that the answer is complete."""
        self._finished = True

    def close(self, error: str = "") -> RequestRecord:
        """The stream ended, with `error` where it broke."""
        return RequestRecord(
            door=self._door,
            num_prompt_tokens=self._work.num_prompt_tokens,
            intended_s=self._intended_s,
            sent_s=self._sent_s,
            end_s=self._clock(),
            arrivals=tuple(self._arrivals),
            num_repeated=self._positions.num_repeated,
            num_skipped=self._positions.num_skipped,
            error=error or self._positions.fault or self._shortfall(),
        )

    def _shortfall(self) -> str:
        if not self._finished:
            return "the stream ended without a finish reason"
        asked = self._work.num_output_tokens
        if self._work.ignore_eos and self.num_tokens != asked:
            return f"{self.num_tokens} tokens came where {asked} were asked for"
        return ""
