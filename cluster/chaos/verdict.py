"""What a campaign showed: counts, pauses and throughput, from the records of its streams alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.chaos.load import StreamRecord, Work
from cluster.chaos.schedule import Fault

__all__ = ["Hit", "Pauses", "Verdict", "percentile", "verdict"]

_PAUSE_COUNTS_S = 0.25  # a shorter wait is the engine's pace, not a pause


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault that took place; times are of `time.monotonic`. `healed_s` is when all was up again."""

    fault: Fault
    at_s: float
    healed_s: float | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Pauses:
    """Of the streams that were open, in seconds; a stream counts with its longest."""

    count: int
    p50_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`differing` is None where no undisturbed answers were compared."""

    seed: int
    num_started: int
    num_finished: int
    num_lost: int
    num_repeated: int
    num_skipped: int
    num_differing: int | None
    num_tokens: int
    pauses: Pauses
    pauses_by_fault: Mapping[str, Pauses]
    heal_by_fault: Mapping[str, Pauses]
    tokens_per_s: Mapping[str, float]  # before, during, after
    hits: Sequence[Mapping[str, object]]
    errors: Sequence[str] = field(default_factory=tuple)

    @property
    def clean(self) -> bool:
        """Nothing lost, nothing repeated, nothing skipped, nothing different."""
        return not (self.num_lost or self.num_repeated or self.num_skipped or self.num_differing)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def verdict(
    records: Sequence[StreamRecord],
    hits: Sequence[Hit],
    *,
    seed: int,
    began_s: float,
    ended_s: float,
    expected: Mapping[Work, list[int]] | None,
) -> Verdict:
    """`began_s` and `ended_s` bound the load; what is before the first fault and behind the last is told apart."""
    finished = [record for record in records if record.finished]
    differing = None
    if expected is not None:
        differing = sum(record.token_ids != expected[record.work] for record in finished)
    return Verdict(
        seed=seed,
        num_started=len(records),
        num_finished=len(finished),
        num_lost=sum(bool(record.error) for record in records),
        num_repeated=sum(record.broken == "repeated" for record in records),
        num_skipped=sum(record.broken == "skipped" for record in records),
        num_differing=differing,
        num_tokens=sum(len(record.token_ids) for record in records),
        pauses=_pauses([record.pause_s for record in records if record.pause_s >= _PAUSE_COUNTS_S]),
        pauses_by_fault=_pauses_by_fault(records, hits),
        heal_by_fault=_heal_by_fault(hits),
        tokens_per_s=_throughput(records, hits, began_s, ended_s),
        hits=[_describe(hit, began_s) for hit in hits],
        errors=sorted({record.error for record in records if record.error} | {hit.error for hit in hits if hit.error}),
    )


def _pauses(values: Sequence[float]) -> Pauses:
    return Pauses(len(values), percentile(values, 0.5), percentile(values, 0.99), max(values, default=0.0))


def _pauses_by_fault(records: Sequence[StreamRecord], hits: Sequence[Hit]) -> dict[str, Pauses]:
    """A pause belongs to the first fault within it, or to the last one before it."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record.pause_s < _PAUSE_COUNTS_S:
            continue
        within = [hit for hit in hits if 0 <= hit.at_s - record.paused_at_s <= record.pause_s]
        before = [hit for hit in hits if hit.at_s < record.paused_at_s]
        for hit in within[:1] or before[-1:]:
            found.setdefault(_kind(hit), []).append(record.pause_s)
    return {kind: _pauses(values) for kind, values in sorted(found.items())}


def _heal_by_fault(hits: Sequence[Hit]) -> dict[str, Pauses]:
    found: dict[str, list[float]] = {}
    for hit in hits:
        if hit.healed_s is not None:
            found.setdefault(_kind(hit), []).append(hit.healed_s - hit.at_s)
    return {kind: _pauses(values) for kind, values in sorted(found.items())}


def _throughput(
    records: Sequence[StreamRecord], hits: Sequence[Hit], began_s: float, ended_s: float
) -> dict[str, float]:
    first_s = hits[0].at_s if hits else ended_s
    last_s = max((hit.healed_s or hit.at_s for hit in hits), default=ended_s)
    spans = {"before": (began_s, first_s), "during": (first_s, last_s), "after": (last_s, ended_s)}
    arrivals = [arrival for record in records for arrival in record.arrivals]
    return {
        name: sum(count for at_s, count in arrivals if start_s <= at_s < end_s) / (end_s - start_s)
        for name, (start_s, end_s) in spans.items()
        if end_s > start_s
    }


def _kind(hit: Hit) -> str:
    two = " (two at once)" if len(hit.fault.targets) > 1 else ""
    return f"{hit.fault.kind} {hit.fault.role}{two}"


def _describe(hit: Hit, began_s: float) -> dict[str, object]:
    return {
        "at_s": round(hit.at_s - began_s, 3),
        "fault": hit.fault.kind,
        "role": hit.fault.role,
        "targets": list(hit.fault.targets),
        "healed_after_s": None if hit.healed_s is None else round(hit.healed_s - hit.at_s, 3),
        "error": hit.error,
    }
