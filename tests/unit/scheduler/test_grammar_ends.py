"""Sequences that end because their grammar does: what the sampler says of it, and what becomes of that."""

from __future__ import annotations

import pytest

from scheduler.batcher import Batcher
from scheduler.plan import Event, FinishReason, SequenceResult, StepPlan, StepResult
from scheduler.request import Request
from tests.unit.scheduler.harness import Clock, request, settings


def batcher(*requests: Request) -> Batcher:
    made = Batcher(settings(prefix_cache=False), clock=Clock())
    for one in requests:
        made.submit(one)
    return made


def result(plan: StepPlan, **ends: SequenceResult) -> StepResult:
    """7 for everyone who samples, but for those that end."""
    return StepResult(tuple(ends.get(s.key, SequenceResult(7 if s.samples else None)) for s in plan.sequences))


def step(batcher: Batcher, **ends: SequenceResult) -> list[Event]:
    plan = batcher.schedule()
    assert plan is not None
    events = batcher.commit(plan, result(plan, **ends))
    batcher.check_integrity()
    return events


def test_a_token_that_completes_the_grammar_is_the_last() -> None:
    one = batcher(request("a"))
    step(one)
    (event,) = step(one, a=SequenceResult(9, complete=True))
    assert (event.token_id, event.position, event.finish, event.stop_token_id) == (9, 1, FinishReason.STOP, None)
    assert not one.has_work


def test_at_the_last_position_it_is_a_stop_and_no_limit() -> None:
    (event,) = step(batcher(request("a", max_tokens=1)), a=SequenceResult(9, complete=True))
    assert event.finish is FinishReason.STOP


def test_an_end_token_is_named_even_if_it_is_the_first() -> None:
    (event,) = step(batcher(request("a", eos_token_ids=frozenset({5}))), a=SequenceResult(5, complete=True))
    assert (event.finish, event.stop_token_id) == (FinishReason.STOP, 5)


def test_a_replay_of_a_whole_output_ends_without_a_token() -> None:
    one = batcher(request("a", output_token_ids=(7, 9)))
    (event,) = step(one, a=SequenceResult(complete=True))
    assert (event.token_id, event.position, event.finish) == (None, 2, FinishReason.STOP)
    assert one.load().num_free_blocks == one.settings.num_blocks


def test_what_cannot_go_on_ends_with_the_reason() -> None:
    one = batcher(request("a"), request("b"))
    events = {event.key: event for event in step(one, a=SequenceResult(error="leads nowhere"))}
    assert (events["a"].finish, events["a"].error) == (FinishReason.INVALID, "leads nowhere")
    assert events["b"].token_id == 7
    assert events["b"].finish is None


@pytest.mark.parametrize(
    "end", [SequenceResult(9, complete=True), SequenceResult(complete=True)], ids=["token", "none"]
)
def test_the_step_that_was_planned_ahead_is_dropped(end: SequenceResult) -> None:
    one = batcher(request("a"), request("b", max_tokens=4))
    first = one.schedule()
    ahead = one.schedule_ahead()
    assert first is not None
    assert ahead is not None
    events = one.commit(first, result(first, a=end))
    assert {event.key: event.finish for event in events} == {"a": FinishReason.STOP, "b": None}
    for scheduled in ahead.sequences:
        tokens = scheduled.history[scheduled.num_computed : scheduled.num_computed + scheduled.num_tokens]
        assert len(tokens) == scheduled.num_tokens, "every token that the step runs is there"
    events = one.commit(ahead, result(ahead, a=SequenceResult(complete=True)))
    assert [event.key for event in events] == ["b"]
    one.check_integrity()
    while one.has_work:
        step(one)
    assert one.load().num_free_blocks == one.settings.num_blocks
