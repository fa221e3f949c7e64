"""What became of a trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.plan import FinishReason
from scheduler.simulator.trace import Arrival

__all__ = ["Outcome", "Report", "jain", "percentile"]

_DONE = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One request: times are from the trace's beginning."""

    arrival: Arrival
    finish: FinishReason
    end_s: float
    token_times_s: tuple[float, ...]
    num_cached_tokens: int
    replica: int

    @property
    def done(self) -> bool:
        return self.finish in _DONE

    @property
    def refused(self) -> bool:
        """Whether it was sent away before any work was done for it."""
        return not self.done and not self.token_times_s

    @property
    def in_time(self) -> bool:
        """Whether it was answered in full before its deadline."""
        timeout_s = self.arrival.timeout_s
        return self.done and (timeout_s is None or self.end_s <= self.arrival.at_s + timeout_s)

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.arrival.at_s if self.token_times_s else None

    def worst_gap_s(self, since_s: float = 0.0) -> float:
        """The longest time between two tokens of which the later came after `since_s`."""
        pairs = zip(self.token_times_s, self.token_times_s[1:], strict=False)
        return max((later - earlier for earlier, later in pairs if later > since_s), default=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    outcomes: tuple[Outcome, ...]
    end_s: float
    num_steps: int
    num_preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int

    @property
    def met_share(self) -> float:
        """Of the requests, those answered in time."""
        return sum(outcome.in_time for outcome in self.outcomes) / len(self.outcomes)

    @property
    def hit_rate(self) -> float:
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0

    @property
    def arrivals_s(self) -> float:
        """How long requests came."""
        return max(one.arrival.at_s for one in self.outcomes)

    def tokens_per_s(self) -> float:
        """Of prompts, as far as they were not cached, and of answers, while requests came."""
        tenants = sorted({one.arrival.tenant for one in self.outcomes})
        return sum(self.service(tenants, 0.0, self.arrivals_s, output_cost=1.0)) / self.arrivals_s

    def answers_in_time_per_s(self) -> float:
        """While requests came."""
        return sum(one.in_time and one.end_s <= self.arrivals_s for one in self.outcomes) / self.arrivals_s

    def ttft_s(self, share: float) -> float:
        return percentile([one.ttft_s for one in self.outcomes if one.ttft_s is not None], share)

    def worst_gap_s(self, since_s: float = 0.0) -> float:
        return max((one.worst_gap_s(since_s) for one in self.outcomes), default=0.0)

    def service(self, tenants: Sequence[str], from_s: float, to_s: float, *, output_cost: float = 2.0) -> list[float]:
        """What each tenant got within a window: its prompts at their first token, and its answers' tokens."""
        got = dict.fromkeys(tenants, 0.0)
        for one in self.outcomes:
            for index, time_s in enumerate(one.token_times_s):
                if from_s <= time_s < to_s:
                    prompt = len(one.arrival.prompt_token_ids) - one.num_cached_tokens if index == 0 else 0
                    got[one.arrival.tenant] += prompt + output_cost
        return [got[tenant] for tenant in tenants]


def percentile(values: Iterable[float], share: float) -> float:
    """By nearest rank; NaN where there are no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))] if ordered else math.nan


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all are equal, 1/n where one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0
