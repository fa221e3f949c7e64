"""Recorded steps are what the simulator is fitted to."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.plan import ScheduledSequence, StepPlan
from scheduler.request import SamplingParams
from scheduler.simulator.replay import fit, read_steps
from scheduler.simulator.step_time import StepTime
from workers.step_log import StepLog

TRUE = StepTime(fixed_s=0.01, prefill_token_s=0.0002, decode_sequence_s=0.001, context_s=0.03)


def plan(step: int, *parts: tuple[int, int]) -> StepPlan:
    """Of sequences with so many tokens computed and so many to run."""
    sequences = tuple(
        ScheduledSequence(str(at), (), 1, computed, tokens, (), 1, True, SamplingParams())
        for at, (computed, tokens) in enumerate(parts)
    )
    return StepPlan(generation=1, step=step, sequences=sequences)


def test_the_steps_come_back_as_the_time_that_they_took(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps", "engine-0-group-0")
    for step in range(200):
        decodes = [(100 * (at + step % 7), 1) for at in range(step % 9)]
        one = plan(step, *decodes, (16 * (step % 50), 2 + 31 * (step % 13)))
        log.record(one, TRUE.seconds(one) * (1.02 if step % 2 else 0.98))
    log.record(plan(200, (0, 64)), 9.0)  # somebody else was on the machine
    log.close()
    log.record(plan(201, (0, 1)), 1.0)  # late: nobody listens
    (file,) = (tmp_path / "steps").iterdir()
    steps = read_steps(file.read_text().splitlines())
    assert len(steps) == 201
    fitted, error = fit(steps)
    assert fitted.fixed_s == pytest.approx(TRUE.fixed_s, rel=0.1)
    assert fitted.prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=0.1)
    assert fitted.decode_sequence_s == pytest.approx(TRUE.decode_sequence_s, rel=0.1)
    assert fitted.context_s == pytest.approx(TRUE.context_s, rel=0.1)
    assert error == pytest.approx(0.02, rel=0.3)


def test_a_line_that_is_no_step_is_named() -> None:
    with pytest.raises(ValueError, match="line 2 of the steps"):
        read_steps(["[1, [1, 2, 3, 4], 0.5]", "[2, [1], 0.5]"])
