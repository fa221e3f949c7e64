"""What a campaign showed: counts, pauses and throughput, from the records of its streams alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.chaos.load import StreamRecord, Wait, Work
from cluster.chaos.schedule import Fault

__all__ = ["Hit", "Pauses", "Verdict", "percentile", "verdict"]


@dataclass(slots=True)
class Hit:
    """A fault that took place; times are of `time.monotonic`. `healed_s` is when all was up again; one that `overlaps`
    came before what was hit earlier was."""

    fault: Fault
    at_s: float
    healed_s: float | None = None
    error: str = ""
    overlaps: bool = False

    @property
    def label(self) -> str:
        return self.fault.label + " (while others return)" * self.overlaps


@dataclass(frozen=True, slots=True)
class Pauses:
    """Of the streams that were open, in seconds: a stream counts with its longest, one that did not wait with 0."""

    count: int
    p50_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`differing` is None where no undisturbed answers were compared; `stopped` says why the campaign ended early."""

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
    undisturbed: Pauses  # before the first fault
    heal_by_fault: Mapping[str, Pauses]
    tokens_per_s: Mapping[str, float]  # before, during, after
    hits: Sequence[Mapping[str, object]]
    errors: Sequence[str] = field(default_factory=tuple)
    limits_s: Mapping[str, float] = field(default_factory=dict)
    stopped: str = ""

    @property
    def clean(self) -> bool:
        """Nothing lost, nothing repeated, nothing skipped, nothing different, and the campaign went to its end."""
        return not (self.num_lost or self.num_repeated or self.num_skipped or self.num_differing or self.stopped)


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
    limits_s: Mapping[str, float] | None = None,
    stopped: str = "",
) -> Verdict:
    """`began_s` and `ended_s` bound the load; what is before the first fault and behind the last is told apart."""
    finished = [record for record in records if record.finished]
    differing = None
    if expected is not None:
        differing = sum(record.token_ids != expected[record.work] for record in finished)
    pauses = [list(_pauses_after(records, hits, index)) for index in range(len(hits))]
    by_fault: dict[str, list[float]] = {}
    for hit, lengths in zip(hits, pauses, strict=True):
        by_fault.setdefault(hit.label, []).extend(lengths)
    return Verdict(
        seed=seed,
        num_started=len(records),
        num_finished=len(finished),
        num_lost=sum(bool(record.error) for record in records),
        num_repeated=sum(record.broken == "repeated" for record in records),
        num_skipped=sum(record.broken == "skipped" for record in records),
        num_differing=differing,
        num_tokens=sum(len(record.token_ids) for record in records),
        pauses=_pauses([length for lengths in pauses for length in lengths]),
        pauses_by_fault={label: _pauses(lengths) for label, lengths in sorted(by_fault.items())},
        undisturbed=_pauses(list(_pauses_before(records, hits))),
        heal_by_fault=_heal_by_fault(hits),
        tokens_per_s=_throughput(records, hits, began_s, ended_s),
        hits=[_describe(hit, began_s, lengths) for hit, lengths in zip(hits, pauses, strict=True)],
        errors=sorted({record.error for record in records if record.error} | {hit.error for hit in hits if hit.error}),
        limits_s=dict(limits_s or {}),
        stopped=stopped,
    )


def _pauses(values: Sequence[float]) -> Pauses:
    return Pauses(len(values), percentile(values, 0.5), percentile(values, 0.99), max(values, default=0.0))


def _pauses_after(records: Sequence[StreamRecord], hits: Sequence[Hit], index: int) -> Iterator[float]:
    """Of each stream that was open at the fault or waited because of it."""
    at_s = hits[index].at_s
    for record in records:
        lengths = [wait.length_s for wait in record.waits if _cause(wait, hits) == index]
        open_then = record.started_s <= at_s and (record.ended_s is None or at_s < record.ended_s)
        if lengths or open_then:
            yield max(lengths, default=0.0)


def _cause(wait: Wait, hits: Sequence[Hit]) -> int:
    """A wait belongs to the first fault within it, or to the last one before it; -1 before all."""
    within = [index for index, hit in enumerate(hits) if 0 <= hit.at_s - wait.began_s <= wait.length_s]
    return within[0] if within else sum(hit.at_s < wait.began_s for hit in hits) - 1


def _pauses_before(records: Sequence[StreamRecord], hits: Sequence[Hit]) -> Iterator[float]:
    """Of each stream that was begun before the first fault."""
    for record in records:
        if not hits or record.started_s < hits[0].at_s:
            yield max((wait.length_s for wait in record.waits if _cause(wait, hits) < 0), default=0.0)


def _heal_by_fault(hits: Sequence[Hit]) -> dict[str, Pauses]:
    found: dict[str, list[float]] = {}
    for hit in hits:
        if hit.healed_s is not None:
            found.setdefault(hit.label, []).append(hit.healed_s - hit.at_s)
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


def _describe(hit: Hit, began_s: float, pauses_s: Sequence[float]) -> dict[str, object]:
    return {
        "at_s": round(hit.at_s - began_s, 3),
        "fault": hit.label,
        "targets": list(hit.fault.targets),
        "healed_after_s": None if hit.healed_s is None else round(hit.healed_s - hit.at_s, 3),
        "longest_pause_s": round(max(pauses_s, default=0.0), 3),
        "error": hit.error,
    }
