"""The scheduler's figures: from what the commands found to rows, with the plain policy as the peer."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest

from loadtest import figures
from loadtest.peers import scheduler_simulated, scheduler_trace
from loadtest.peers.scheduler_engine import Conversations, worst_gap_s
from loadtest.peers.scheduler_engine import findings_of as engine_findings
from loadtest.record import RequestRecord, TokenArrival
from loadtest.workload import Work
from scheduler.simulator.comparisons import Comparison, Row
from scheduler.simulator.trace import read


def table(columns: tuple[str, ...], **rows: tuple[float, ...]) -> dict[str, object]:
    names = {name.replace("_", " ").replace(" and ", ", "): values for name, values in rows.items()}
    comparison = Comparison("t", columns, tuple(Row(name, values) for name, values in names.items()))
    found: dict[str, object] = json.loads(json.dumps(asdict(comparison)))
    return found


def test_simulated_policies_stand_beside_plain_ones() -> None:
    cost = {
        str(size): {"plain": {"median_ms": ms}, "tenants": {"median_ms": 2 * ms}, "goal_ms": goal}
        for size, ms, goal in ((64, 0.2, 0.3), (1024, 5.0, 4.0))
    }
    hits = ("hit rate", "TTFT p50 ms", "TTFT p99 ms")
    tables = {
        "tenants": table(("Jain's index", "light TTFT p50 s"), first_come=(0.5, 4.0), token_counter=(0.99, 0.5)),
        "deadlines": table(
            ("deadlines met", "tokens/s"), first_come=(0.25, 100.0), deadline_first_and_late_refused=(0.75, 100.0)
        ),
        "prefixes": table(hits, **{"round-robin": (0.2, 40.0, 90.0), "prefix-affinity": (0.8, 20.0, 50.0)}),
        "gaps": table(("worst gap ms", "long TTFT ms"), plain=(90.0, 500.0), steps_of_50_ms=(50.0, 800.0)),
    }
    found = scheduler_simulated.findings_of(cost, tables)
    rows = {figure.what: figure for figure in found.figures}
    assert rows["scheduling a step of 64 running sequences"].reached
    assert rows["scheduling a step of 1024 running sequences"].reached is False
    assert rows["Jain's index, one heavy and four light tenants"].reached
    assert rows["deadlines met at 1.2 times the load"].ratio == 3.0
    assert rows["throughput at that load"].reached
    assert rows["prefix hits, conversations"].ratio == 4.0
    assert rows["worst gap while 8k tokens are prefilled"].peers == (90.0,)


def test_the_trace_is_read_as_it_was_written() -> None:
    work = [Work(prompt=(1,) * length, num_output_tokens=length + 1) for length in (3, 5)]
    arrivals = read(random.Random(1), scheduler_trace.trace_lines(work, [0.5, 2.0]))
    assert [(one.at_s, len(one.prompt_token_ids), len(one.answer_token_ids)) for one in arrivals] == [
        (0.5, 3, 4),
        (2.0, 5, 6),
    ]


def record(error: str = "") -> RequestRecord:
    arrivals = (TokenArrival(10.2, 1), TokenArrival(10.9, 9))
    return RequestRecord(
        door="grpc", num_prompt_tokens=4, intended_s=10.0, sent_s=10.0, end_s=11.0, arrivals=arrivals, error=error
    )


def test_the_error_of_the_simulator_is_told() -> None:
    simulated = {
        "ttft_s": [0.1],
        "e2e_s": [0.9],
        "num_output_tokens": 10,
        "duration_s": 0.8,
        "step_time": {"fixed_s": 0.01, "prefill_token_s": 0.001},
        "fit_error": 0.05,
    }
    found = scheduler_trace.findings_of([record()], simulated, {}, idle_s=0.02)
    assert found.figures[0].ratio == pytest.approx(1.25)
    assert "time to first token, p99 -50%" in found.facts["error of the simulator"]
    with pytest.raises(RuntimeError, match="1 requests failed"):
        scheduler_trace.findings_of([record(), record("UNAVAILABLE")], simulated, {}, idle_s=0.02)
    slow = scheduler_trace.findings_of([record()], simulated, {}, idle_s=0.126)
    assert "time to first token, p99 +0%" in slow.facts["error of the simulator"]
    assert slow.facts["added for the doors"].startswith("100.0 ms")


def test_a_gap_counts_where_it_touches_the_window() -> None:
    times_s = (0.0, 1.0, 1.1, 2.0, 5.0)
    assert worst_gap_s(times_s, 1.05, 1.5) == pytest.approx(0.9)
    assert worst_gap_s(times_s, 6.0, 7.0) == 0.0


def test_rounds_of_the_engine() -> None:
    ours, plain = (Conversations(hit_rate=rate, ttft_p50_s=0.1, ttft_p99_s=0.2) for rate in (0.6, 0.3))
    found = engine_findings([((0.1, 4.0), (0.8, 2.0))] * 2, [(ours, plain)], {})
    assert found.figures[0].ratio == pytest.approx(0.125)
    assert found.figures[2].reached
    assert len(found.figures) == 5


def test_a_group_of_sections_is_all_of_them() -> None:
    assert set(figures.GROUPS["scheduler"]) == {name for name in figures.SECTIONS if name.startswith("scheduler")}
