"""Who is not let in, who must leave the queue, and who gives way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from scheduler.plan import FinishReason
from scheduler.policy import priority_then_deadline
from tests.unit.scheduler.harness import Bench, request, settings

FIXED_S, TOKEN_S = 0.010, 0.001


def timed_step(bench: Bench) -> None:
    """A step on a machine whose steps take a fixed time, and a time per token."""
    plan = bench.schedule()
    if plan is not None:
        bench.clock.now_s += FIXED_S + TOKEN_S * plan.num_tokens
        bench.commit()


def warm(**changes: Any) -> Bench:
    """A bench that has seen enough steps and answers to make estimates."""
    limits = {"prefix_cache": False, "refuse_late": True, "order": "deadline", "num_blocks": 512, "max_model_len": 512}
    bench = Bench(settings(**(limits | changes)))
    for turn in range(4):
        bench.submit(*(request(f"warm{turn}.{index}", 2 + 8 * index, max_tokens=12) for index in range(8)))
        while bench.batcher.has_work:
            timed_step(bench)
    return bench


def drain(bench: Bench) -> None:
    while bench.batcher.has_work:
        timed_step(bench)
    bench.check_end()


def due(bench: Bench, key: str, seconds: float, prompt: int = 64, **changes: Any) -> None:
    now_s = bench.clock.now_s
    bench.submit(request(key, prompt, arrival_s=now_s, deadline_s=now_s + seconds, ignore_eos=True, **changes))


def test_what_cannot_meet_its_deadline_is_refused_with_the_estimate() -> None:
    bench = warm()
    due(bench, "a", 0.5, max_tokens=100)  # 100 steps of 11 ms
    (event,) = bench.events["a"]
    assert event.finish is FinishReason.DEADLINE
    assert event.error == "not to be done by its deadline: about 1.16 s are needed, 0.5 s are left"
    assert event.retry_after_s is None, "it would never be done in so short a time"
    due(bench, "b", 1.3, max_tokens=100)
    drain(bench)
    assert bench.finish("b") is FinishReason.LENGTH


def test_a_doubtful_estimate_refuses_nobody() -> None:
    bench = warm()
    due(bench, "a", 1.1, max_tokens=100)
    assert not bench.events["a"], "1.16 s are estimated, from few steps"
    drain(bench)
    assert bench.finish("a") is FinishReason.DEADLINE


def test_what_is_ahead_counts_and_the_hint_is_when_it_is_gone() -> None:
    bench = warm(max_batch_size=1)
    due(bench, "a", 2.0, max_tokens=100)
    timed_step(bench)
    due(bench, "b", 1.5, max_tokens=100)
    (event,) = bench.events["b"]
    assert event.finish is FinishReason.REFUSED
    assert event.retry_after_s == pytest.approx(2 * (0.074 + 99 * 0.011) - 0.074 - 1.5, rel=0.1)
    due(bench, "c", 3.0, max_tokens=100)
    drain(bench)
    assert [bench.finish(key) for key in "ac"] == [FinishReason.LENGTH] * 2


def test_what_goes_before_others_is_not_refused_for_them() -> None:
    bench = warm(max_batch_size=1)
    due(bench, "running", 2.0, max_tokens=10)
    timed_step(bench)
    due(bench, "patient", 60.0, max_tokens=100)
    due(bench, "urgent", 0.5, max_tokens=10)
    due(bench, "less", 0.5, max_tokens=10, priority=1)
    assert bench.finish("less") is FinishReason.REFUSED
    drain(bench)
    assert bench.finish("urgent") is FinishReason.LENGTH


def test_answers_are_expected_to_be_as_long_as_they_were() -> None:
    bench = warm(max_model_len=2048)
    for index in range(30):  # each ends after a few of its 1000 tokens
        bench.submit(request(str(index), 5, max_tokens=1000, eos_token_ids=frozenset(range(0, 23, 2))))
    while bench.batcher.has_work:
        timed_step(bench)
    now_s = bench.clock.now_s
    bench.submit(request("a", 5, max_tokens=1000, deadline_s=now_s + 3.0))
    assert not bench.events["a"]
    bench.submit(request("b", 5, max_tokens=1000, deadline_s=now_s + 3.0, ignore_eos=True))
    assert bench.finish("b") is FinishReason.DEADLINE


def test_what_may_answer_at_length_is_not_refused_for_short_answers_that_used_all_they_might() -> None:
    bench = warm()
    bench.submit(request("a", 5, max_tokens=400, deadline_s=bench.clock.now_s + 1.0))
    assert not bench.events["a"], "400 tokens would be too many, and the longest answer so far had 12"


def test_without_data_nobody_is_refused() -> None:
    bench = Bench(settings(refuse_late=True))
    due(bench, "a", 1e-6, prompt=5, max_tokens=10)
    assert not bench.events["a"]


def test_a_replay_is_not_refused_for_its_deadline() -> None:
    bench = warm()
    due(bench, "a", 0.1, max_tokens=100, output_token_ids=(1, 2))
    assert not bench.events["a"]


def test_what_became_too_late_in_the_queue_is_dropped_before_its_prefill() -> None:
    bench = warm(max_batch_size=1)
    due(bench, "a", 60.0, max_tokens=50)
    timed_step(bench)
    due(bench, "b", 1.5, max_tokens=60)
    assert not bench.events["b"]
    for _ in range(10):
        timed_step(bench)
        bench.clock.now_s += 0.06  # somebody else was on the machine
    drain(bench)
    assert (bench.finish("b"), bench.output("b")) == (FinishReason.DEADLINE, [])
    assert bench.events["b"][0].error.startswith("not to be done by its deadline")


def test_the_server_s_own_limit_on_waiting() -> None:
    bench = Bench(settings(max_batch_size=1, max_queue_s=2.0, num_blocks=6))
    bench.submit(request("a", 4, max_tokens=12), request("b", 4, max_tokens=2))
    for _ in range(3):
        bench.step()
        bench.clock.now_s += 1.0
    bench.step()
    (event,) = bench.events["b"]
    assert (event.finish, event.retry_after_s) == (FinishReason.REFUSED, 2.0)
    assert "max_queue_s" in event.error
    bench.drain()
    assert bench.finish("a") is FinishReason.LENGTH


def test_a_preempted_sequence_may_wait_for_longer() -> None:
    bench = Bench(settings(num_blocks=6, max_queue_s=2.0, prefix_cache=False))
    bench.submit(request("a", 4, max_tokens=16), request("b", 4, max_tokens=16))
    while bench.batcher.has_work:
        bench.step()
        bench.clock.now_s += 1.0
    assert bench.batcher.load().num_preemptions
    bench.check_end()


def test_the_queue_is_bounded_in_tokens() -> None:
    bench = Bench(settings(max_batch_size=1, max_waiting_tokens=20))
    bench.submit(request("a", 30), request("b", 5))
    assert bench.finish("b") is FinishReason.REFUSED
    assert bench.events["b"][0].error == "queue full: 30 tokens are waiting, and max_waiting_tokens is 20"
    bench.step()
    bench.submit(request("c", 15), request("d", 6), request("e", 5))
    assert [bench.finish(key) for key in "cde"] == [None, FinishReason.REFUSED, None]


def test_a_full_queue_sheds_the_newest_of_a_lower_class() -> None:
    bench = Bench(settings(max_waiting=3))
    bench.submit(request("a", priority=1), request("b", priority=2), request("c", priority=2))
    bench.submit(request("d", priority=1), request("e", priority=2), request("f"))
    ends = {key: bench.finish(key) for key in "abcdef"}
    refused = FinishReason.REFUSED
    assert ends == {"a": None, "b": refused, "c": refused, "d": None, "e": refused, "f": None}


def test_nobody_is_shed_where_that_would_not_help() -> None:
    bench = Bench(settings(max_waiting_tokens=20))
    bench.submit(request("a", 5, priority=1), request("b", 12), request("c", 12))
    assert [bench.finish(key) for key in "abc"] == [None, None, FinishReason.REFUSED]


def test_an_urgent_request_takes_the_slot_of_a_lower_class() -> None:
    for preempt in (False, True):
        bench = Bench(settings(max_batch_size=2, preempt_lower=preempt))
        bench.submit(request("a", max_tokens=8), request("b", max_tokens=8, priority=1))
        bench.step()
        bench.submit(request("same", max_tokens=8, priority=1), request("urgent", 6, max_tokens=8))
        assert ("urgent" in {one.key for one in bench.step().sequences}) == preempt
        assert bench.batcher.load().num_preemptions == preempt
        bench.drain()
        bench.check_end()


def test_nobody_gives_way_in_vain() -> None:
    bench = Bench(settings(num_blocks=8, preempt_lower=True, prefix_cache=False))
    bench.submit(request("first", 20, max_tokens=8), request("low", 4, max_tokens=8, priority=1))
    bench.step()
    bench.submit(request("urgent", 12, max_tokens=1))
    bench.step()
    assert bench.batcher.load().num_preemptions == 0
    bench.drain()
    bench.check_end()


def test_blocks_of_lower_classes_are_taken_too() -> None:
    bench = Bench(settings(num_blocks=8, preempt_lower=True, prefix_cache=False))
    bench.submit(*(request(f"low{index}", 9, max_tokens=4, priority=1) for index in range(2)))
    bench.step()
    bench.submit(request("urgent", 12, max_tokens=1))
    assert {one.key for one in bench.step().sequences} == {"low0", "urgent"}
    bench.drain()
    bench.check_end()


wanted = st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(1, 200))), min_size=1, max_size=10)


@given_settings(deadline=None, derandomize=True)
@given(wanted)
def test_a_class_is_served_by_deadlines(requests: list[tuple[int, int | None]]) -> None:
    bench = Bench(settings(max_batch_size=1, order="deadline"))
    for index, (priority, seconds) in enumerate(requests):
        deadline_s = None if seconds is None else 100.0 + seconds
        bench.submit(request(str(index), max_tokens=1, priority=priority, deadline_s=deadline_s))
    served = [bench.step().sequences[0].key for _ in requests]
    ordered = sorted(bench.requests.values(), key=lambda one: (*priority_then_deadline(one), int(one.key)))
    assert served == [one.key for one in ordered]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"order": "random"}, "order must be one of arrival, deadline, not 'random'"),
        ({"max_queue_s": -1.0}, "max_queue_s must be 0"),
        ({"target_step_s": float("nan")}, "target_step_s must be 0"),
    ],
)
def test_settings_name_the_field_at_fault(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        settings(**changes)
