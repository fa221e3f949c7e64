"""Records in, percentiles out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.record import RequestRecord

__all__ = ["LATENCIES", "Distribution", "Summary", "percentile", "summarize"]

# The latencies a summary holds, by attribute, with the words for people.
LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "end to end",
    "send_delay": "sent later than meant",
}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, with linear interpolation between the two nearest."""
    assert ordered
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Of a latency, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None of nothing."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p95, p99 = (percentile(ordered, percent) for percent in (50, 90, 95, 99))
        return cls(
            count=len(ordered),
            mean=math.fsum(ordered) / len(ordered),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            max=ordered[-1],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run came to.

    Latencies are of the requests that were answered in full; the others are counted in `errors`, by message, most
    frequent first. `duration_s` runs from the first intended send to the last end, and throughput counts every
    token that came within it.
    """

    num_requests: int
    errors: tuple[tuple[str, int], ...]
    num_repeated: int
    num_skipped: int
    duration_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    send_delay: Distribution | None

    @property
    def num_errors(self) -> int:
        return sum(count for _, count in self.errors)

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def requests_per_s(self) -> float:
        return (self.num_requests - self.num_errors) / self.duration_s if self.duration_s else 0.0


def summarize(records: Sequence[RequestRecord]) -> Summary:
    """Of one run, through one door."""
    good = [record for record in records if not record.error]
    start_s = min((record.intended_s for record in records), default=0.0)
    end_s = max((record.end_s for record in records), default=0.0)
    return Summary(
        num_requests=len(records),
        errors=tuple(Counter(record.error for record in records if record.error).most_common()),
        num_repeated=sum(record.num_repeated for record in records),
        num_skipped=sum(record.num_skipped for record in records),
        duration_s=end_s - start_s,
        num_prompt_tokens=sum(record.num_prompt_tokens for record in records),
        num_output_tokens=sum(record.num_output_tokens for record in records),
        ttft=Distribution.of(record.ttft_s for record in good if record.ttft_s is not None),
        tpot=Distribution.of(record.tpot_s for record in good if record.tpot_s is not None),
        itl=Distribution.of(gap for record in good for gap in record.gaps_s),
        e2e=Distribution.of(record.e2e_s for record in good),
        send_delay=Distribution.of(record.send_delay_s for record in records),
    )
