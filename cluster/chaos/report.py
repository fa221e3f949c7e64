"""A campaign's verdict as text, JSON and a page of its own."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from cluster.chaos.verdict import Pauses, Verdict

__all__ = ["as_html", "as_json", "as_lines"]


def as_json(verdict: Verdict) -> str:
    return json.dumps({**asdict(verdict), "clean": verdict.clean}, indent=2)


def as_lines(verdict: Verdict) -> Iterator[str]:
    """For a terminal, and for Markdown."""
    for name, value in _counts(verdict):
        yield f"{name}: {value}"
    yield f"pauses, undisturbed: {_pauses(verdict.undisturbed)}"
    for name, pauses in (("any fault", verdict.pauses), *verdict.pauses_by_fault.items()):
        goal = _goal(verdict, name)
        yield f"pauses after {name}: {_pauses(pauses)}" + f"; p99 {goal}" * bool(goal)
    for name, pauses in verdict.heal_by_fault.items():
        yield f"whole again after {name}: {_pauses(pauses)}"
    yield "tokens/s: " + ", ".join(f"{value:.0f} {name}" for name, value in verdict.tokens_per_s.items())
    for error in verdict.errors:
        yield f"error: {error}"
    if verdict.stopped:
        yield f"stopped early: {verdict.stopped}"


def as_html(verdict: Verdict) -> str:
    """One file without scripts or anything from elsewhere."""
    rows = (("any fault", verdict.pauses), *verdict.pauses_by_fault.items(), ("nothing yet", verdict.undisturbed))
    parts = [
        _table(("", ""), _counts(verdict)),
        "<h2>Pauses, in seconds</h2>",
        _table(
            ("after", "streams", "p50", "p99", "longest", "goal for p99"),
            [[*_row(name, pauses), _goal(verdict, name)] for name, pauses in rows],
        ),
        "<h2>Whole again, in seconds</h2>",
        _table(("after", "times", "p50", "p99", "longest"), [_row(*item) for item in verdict.heal_by_fault.items()]),
        "<h2>Tokens per second</h2>",
        _table(tuple(verdict.tokens_per_s), [[f"{value:.0f}" for value in verdict.tokens_per_s.values()]]),
        "<h2>Faults</h2>",
        _table(
            ("at", "fault", "targets", "longest pause", "whole again after", ""),
            [
                (
                    hit["at_s"],
                    hit["fault"],
                    ", ".join(map(str, _targets(hit))),
                    hit["longest_pause_s"],
                    hit["healed_after_s"],
                    hit["error"],
                )
                for hit in verdict.hits
            ],
        ),
        *([f"<h2>Errors</h2><ul>{_items(verdict.errors)}</ul>"] if verdict.errors else []),
        *([f"<h2>Stopped early</h2><p>{html.escape(verdict.stopped)}</p>"] if verdict.stopped else []),
    ]
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:2px 12px;text-align:left}h1 b{color:%s}"
    colour, word = ("#080", "nothing lost") if verdict.clean else ("#b00", "not clean")
    head = f"<meta charset=utf-8><title>Chaos</title><style>{style % colour}</style>"
    return f"<!doctype html>{head}<h1>Chaos: <b>{word}</b></h1>{''.join(parts)}\n"


def _counts(verdict: Verdict) -> list[tuple[str, object]]:
    compared = "not compared" if verdict.num_differing is None else verdict.num_differing
    return [
        ("seed", verdict.seed),
        ("faults", len(verdict.hits)),
        ("requests started", verdict.num_started),
        ("finished", verdict.num_finished),
        ("lost", verdict.num_lost),
        ("streams with a repeated token", verdict.num_repeated),
        ("streams with a skipped token", verdict.num_skipped),
        ("streams that differ from the undisturbed ones", compared),
        ("tokens", verdict.num_tokens),
    ]


def _pauses(pauses: Pauses) -> str:
    return f"{pauses.count}, p50 {pauses.p50_s:.2f} s, p99 {pauses.p99_s:.2f} s, longest {pauses.max_s:.2f} s"


def _goal(verdict: Verdict, name: str) -> str:
    """Empty where there is none."""
    limit_s, pauses = verdict.limits_s.get(name), verdict.pauses_by_fault.get(name)
    if limit_s is None or pauses is None:
        return ""
    return f"<= {limit_s:g} s: {'reached' if pauses.p99_s <= limit_s else 'MISSED'}"


def _row(name: str, pauses: Pauses) -> list[object]:
    return [name, pauses.count, f"{pauses.p50_s:.2f}", f"{pauses.p99_s:.2f}", f"{pauses.max_s:.2f}"]


def _targets(hit: object) -> Iterable[object]:
    assert isinstance(hit, dict)
    return hit["targets"]  # type: ignore[no-any-return]


def _items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{html.escape(text)}</li>" for text in texts)


def _table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
