"""A run's summaries for people (a table) and for machines (JSON)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.stats import LATENCIES, Distribution, Summary

__all__ = ["as_json", "print_summaries"]

_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def as_json(summaries: Mapping[str, Summary], facts: Mapping[str, object]) -> str:
    """Summaries by door under "doors", beside `facts` of the run. Latencies are in seconds."""
    doors: dict[str, Any] = {}
    for door, summary in summaries.items():
        doors[door] = dataclasses.asdict(summary) | {
            "errors": dict(summary.errors),
            "num_errors": summary.num_errors,
            "output_tokens_per_s": summary.output_tokens_per_s,
            "requests_per_s": summary.requests_per_s,
        }
    return json.dumps({**facts, "doors": doors}, indent=2)


def print_summaries(summaries: Mapping[str, Summary], console: Console) -> None:
    """One table for each door; latencies in milliseconds."""
    for door, summary in summaries.items():
        table = Table(title=f"{door}: {_headline(summary)}", title_justify="left", title_style="bold")
        table.add_column("milliseconds")
        for column in _COLUMNS:
            table.add_column(column, justify="right")
        for name, words in LATENCIES.items():
            table.add_row(words, *_cells(getattr(summary, name)))
        console.print(table)
        for message, count in summary.errors:
            console.print(f"{count} x {message}", style="red", markup=False)


def _headline(summary: Summary) -> str:
    return (
        f"{summary.num_requests} requests, {summary.num_errors} errors, {summary.requests_per_s:.2f} requests/s, "
        f"{summary.output_tokens_per_s:.1f} output tokens/s in {summary.duration_s:.1f} s"
    )


def _cells(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return ["-"] * len(_COLUMNS)
    return [f"{getattr(distribution, column) * 1e3:.1f}" for column in _COLUMNS]
