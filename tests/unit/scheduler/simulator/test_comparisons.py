"""The policies give what they are for: the goals, on smaller traces than the command's."""

from __future__ import annotations

import pytest

from scheduler.simulator import comparisons
from scheduler.simulator.__main__ import main, table
from scheduler.simulator.overhead import measure
from scheduler.simulator.step_time import StepTime

STEP_TIME = StepTime()


def test_the_token_counter_is_fair_and_first_come_is_not() -> None:
    found = comparisons.tenants(STEP_TIME, seconds=10.0)
    assert found.value("first come", "Jain's index") < 0.7
    assert found.value("token counter", "Jain's index") >= 0.95
    assert found.value("token counter", "service/s") >= 0.97 * found.value("first come", "service/s")


def test_more_deadlines_are_met_under_overload() -> None:
    found = comparisons.deadlines(STEP_TIME, num_requests=500, overload=1.6)
    first, last = "first come", "deadline first, late refused"
    assert found.value(last, "deadlines met") > found.value(first, "deadlines met") + 0.1
    assert found.value(last, "answers/s in time") >= found.value(first, "answers/s in time")


def test_prefix_routing_finds_more_and_answers_sooner() -> None:
    found = comparisons.prefixes(STEP_TIME, num_sessions=25)
    assert found.value("prefix-affinity", "hit rate") > found.value("round-robin", "hit rate") + 0.15
    assert found.value("prefix-affinity", "TTFT p50 ms") < found.value("round-robin", "TTFT p50 ms")


def test_a_long_prompt_does_not_stall_the_others() -> None:
    found = comparisons.gaps(STEP_TIME)
    assert found.value("steps of 25 ms", "worst gap ms") <= 30.0
    assert found.value("plain", "worst gap ms") >= 3 * found.value("steps of 25 ms", "worst gap ms")


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["gaps", "--step-time", "0.01,0.00005,0.0001,0.001"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ")[-1].strip() == "short TTFT ms"
    assert len({len(line) for line in lines[1:5]}) == 1
    assert "plain" in lines[2]


@pytest.mark.parametrize("arguments", [["nothing"], ["--step-time", "1,2"], ["--step-time", "a,b,c,d"]])
def test_the_command_refuses_what_it_does_not_know(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error" in capsys.readouterr().err


def test_a_table_is_aligned() -> None:
    row = comparisons.Row("a policy", (0.123456, 12345.6))
    text = table(comparisons.Comparison("title", ("x", "long name"), (row,)))
    assert text.splitlines() == ["title", "              x  long name", "a policy  0.123      12346"]


def test_scheduling_is_measured() -> None:
    found = measure(16, 20)
    assert 0.0 < found.median_ms <= found.p99_ms
