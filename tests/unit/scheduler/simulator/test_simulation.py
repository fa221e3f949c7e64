"""The simulator: a trace is played to its end, and what comes out is what the step times say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler.plan import FinishReason
from scheduler.routing import POLICIES
from scheduler.simulator.comparisons import settings
from scheduler.simulator.outcome import jain, percentile
from scheduler.simulator.simulation import simulate
from scheduler.simulator.step_time import Features, StepTime
from scheduler.simulator.trace import Arrival, drawn, poisson, read, sessions

STEP_TIME = StepTime(fixed_s=0.01, prefill_token_s=0.001, decode_sequence_s=0.002, context_s=0.0)


def arrival(at_s: float, prompt: int, answer: int, **changes: object) -> Arrival:
    one = Arrival(at_s=at_s, prompt_token_ids=tuple(range(1, prompt + 1)), answer_token_ids=(5,) * answer)
    return replace(one, **changes)  # type: ignore[arg-type]


def test_one_request_takes_what_its_steps_take() -> None:
    report = simulate([arrival(3.0, 100, 4)], settings(), step_time=STEP_TIME)
    (outcome,) = report.outcomes
    first = 3.0 + 0.01 + 0.1
    assert outcome.token_times_s == pytest.approx([first, first + 0.012, first + 0.024, first + 0.036])
    assert (outcome.finish, report.num_steps) == (FinishReason.LENGTH, 4)
    assert outcome.ttft_s == pytest.approx(0.11)
    assert outcome.worst_gap_s() == pytest.approx(0.012)


def test_an_answer_shorter_than_it_may_be_ends_with_eos() -> None:
    report = simulate([arrival(0.0, 10, 3, max_tokens=50)], settings(), step_time=STEP_TIME)
    (outcome,) = report.outcomes
    assert (outcome.finish, len(outcome.token_times_s)) == (FinishReason.STOP, 4)


def test_what_comes_while_a_step_runs_waits_for_its_end() -> None:
    report = simulate([arrival(0.0, 100, 1), arrival(0.05, 50, 1)], settings(prefix_cache=False), step_time=STEP_TIME)
    assert [outcome.end_s for outcome in report.outcomes] == pytest.approx([0.11, 0.17])


def test_a_missed_deadline_is_not_met() -> None:
    trace = [arrival(0.0, 100, 5, timeout_s=10.0), arrival(1.0, 90, 50, timeout_s=0.3)]
    report = simulate(trace, settings(), step_time=STEP_TIME)
    assert [outcome.in_time for outcome in report.outcomes] == [True, False]
    assert report.outcomes[1].finish is FinishReason.DEADLINE
    assert report.met_share == 0.5


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_everything_that_comes_ends_once_and_the_same_way_each_time(policy: str) -> None:
    def play() -> object:
        rng = random.Random(5)
        trace = sessions(rng, poisson(rng, 4.0, 8.0), system=64, turn=40, answer=20, num_turns=3, pause_s=1.0)
        report = simulate(trace, settings(num_blocks=600), num_replicas=3, policy=POLICIES[policy](random.Random(1)))
        assert len(report.outcomes) == len(trace)
        assert all(len(one.token_times_s) == len(one.arrival.answer_token_ids) for one in report.outcomes)
        return [(one.replica, one.end_s) for one in report.outcomes]

    assert play() == play()


def test_a_trace_is_read_line_by_line() -> None:
    lines = [
        '{"at_s": 2, "prompt_tokens": 30, "output_tokens": 4, "prefix": "p", "prefix_tokens": 20}',
        "",
        '{"at_s": 1, "prompt_tokens": 25, "output_tokens": 1, "prefix": "p", "prefix_tokens": 25, "timeout_s": 3}',
    ]
    first, second = read(random.Random(1), lines)
    assert (first.at_s, first.timeout_s, second.timeout_s) == (1.0, 3.0, None)
    assert (len(second.prompt_token_ids), len(second.answer_token_ids)) == (30, 4)
    assert first.prompt_token_ids[:20] == second.prompt_token_ids[:20]
    assert first.prompt_token_ids[20:25] != second.prompt_token_ids[20:25]


@pytest.mark.parametrize("line", ["{", "[]", '{"at_s": 1, "prompt_tokens": 3}', '{"at_s": "soon"}'])
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 1 of the trace"):
        read(random.Random(1), [line])


def test_lengths_and_times_are_as_drawn() -> None:
    rng = random.Random(2)
    times = list(poisson(rng, 10.0, 100.0))
    assert len(times) == pytest.approx(1000, rel=0.15)
    trace = drawn(rng, times, prompt=200, answer=50)
    assert percentile([len(one.prompt_token_ids) for one in trace], 0.5) == pytest.approx(200, rel=0.15)


def test_a_step_time_is_fitted_to_measured_steps() -> None:
    rng = random.Random(4)
    truth = StepTime(fixed_s=0.02, prefill_token_s=3e-5, decode_sequence_s=2e-4, context_s=0.0)
    steps: list[tuple[Features, float]] = []
    for _ in range(200):
        x: Features = (1.0, rng.choice([0.0, 200.0, 900.0]), float(rng.randint(0, 64)), rng.random())
        seconds = truth.fixed_s + truth.prefill_token_s * x[1] + truth.decode_sequence_s * x[2]
        steps.append((x, seconds * rng.uniform(0.95, 1.05)))
    fitted = StepTime.fit(steps)
    assert fitted.fixed_s == pytest.approx(0.02, rel=0.1)
    assert fitted.prefill_token_s == pytest.approx(3e-5, rel=0.1)
    assert fitted.decode_sequence_s == pytest.approx(2e-4, rel=0.1)
    assert 0.0 <= fitted.context_s < 0.002


@pytest.mark.parametrize("steps", [[], [((1.0, 2.0, 3.0, 4.0), 1.0)] * 9])
def test_steps_that_are_all_alike_cannot_be_fitted(steps: list[tuple[Features, float]]) -> None:
    with pytest.raises(ValueError, match="steps"):
        StepTime.fit(steps)


def test_jain() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([0.0, 0.0]) == 1.0
