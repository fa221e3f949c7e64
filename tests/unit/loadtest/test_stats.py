"""Percentiles, summaries, and what is made of them."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loadtest.html_report import render
from loadtest.record import RequestRecord, TokenArrival
from loadtest.report import as_json, print_summaries
from loadtest.stats import Distribution, percentile, summarize


def _record(intended_s: float, *token_times_s: float, error: str = "") -> RequestRecord:
    return RequestRecord(
        door="grpc",
        num_prompt_tokens=5,
        intended_s=intended_s,
        sent_s=intended_s,
        end_s=token_times_s[-1] if token_times_s else intended_s,
        arrivals=tuple(TokenArrival(at_s, 1) for at_s in token_times_s),
        error=error,
    )


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_nothing_has_no_distribution() -> None:
    assert Distribution.of([]) is None
    assert summarize([]).output_tokens_per_s == 0.0


def test_a_summary_of_two_requests() -> None:
    summary = summarize([_record(0.0, 1.0, 1.5, 2.5), _record(1.0, 1.5, 4.0)])
    assert summary.duration_s == 4.0
    assert summary.num_output_tokens == 5
    assert summary.output_tokens_per_s == 1.25
    assert summary.requests_per_s == 0.5
    assert summary.ttft is not None
    assert summary.ttft.p50 == pytest.approx(0.75)
    assert summary.tpot is not None
    assert summary.tpot.max == pytest.approx(2.5)
    assert summary.itl is not None
    assert summary.itl.count == 3
    assert summary.itl.mean == pytest.approx(4 / 3)
    assert summary.e2e is not None
    assert summary.e2e.max == 3.0


def test_failed_requests_are_counted_and_do_not_flatter_the_latencies() -> None:
    bad = _record(0.0, 0.001, error="UNAVAILABLE: gone")
    summary = summarize([_record(0.0, 1.0, 2.0), bad, bad, _record(0.0, error="HTTP 500")])
    assert summary.num_requests == 4
    assert summary.num_errors == 3
    assert summary.errors == (("UNAVAILABLE: gone", 2), ("HTTP 500", 1))
    assert summary.ttft is not None
    assert (summary.ttft.count, summary.ttft.mean) == (1, 1.0)


def test_json_holds_every_figure() -> None:
    summary = summarize([_record(0.0, 1.0, 1.5, 2.5), _record(0.0, error="HTTP 500")])
    report = json.loads(as_json({"grpc": summary}, {"model": "m"}))
    assert report["model"] == "m"
    assert report["doors"]["grpc"]["ttft"]["p99"] == 1.0
    assert report["doors"]["grpc"]["errors"] == {"HTTP 500": 1}
    assert report["doors"]["grpc"]["output_tokens_per_s"] == pytest.approx(3 / 2.5)


def test_the_table_shows_milliseconds_and_errors() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_summaries({"grpc": summarize([_record(0.0, 0.125, 0.25), _record(0.0, error="[odd] HTTP 500")])}, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert re.search(r"time to first token.*125\.0", text)
    assert "1 x [odd] HTTP 500" in text


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows() -> None:
    records = {"grpc": [_record(0.0, 1.0, 1.5), _record(0.5, error="<script>alert(1)</script>")], "http": []}
    page = render(records, {door: summarize(run) for door, run in records.items()}, {"model": "<m>"})
    assert page.count("<svg") == 5
    assert "<polyline" in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;m&gt;" in page
    assert not re.search(r"(src|href)=|@import|url\(", page)


def test_a_page_without_a_single_answer_is_still_a_page() -> None:
    records = {"grpc": [_record(0.0, error="gone")]}
    assert "<svg" in render(records, {door: summarize(run) for door, run in records.items()}, {})
