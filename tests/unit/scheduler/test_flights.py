"""Several steps in flight on sequences of their own: the same outputs as one at a time, and all stages have work."""

from __future__ import annotations

import random

import pytest

from scheduler.plan import FinishReason, StepPlan
from tests.unit.scheduler.harness import Bench, request, settings
from tests.unit.scheduler.test_traces import check_prompt_logprobs, random_request


def shape(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(one.key, one.num_computed, one.num_tokens) for one in plan.sequences]


def decoding(num_flights: int, count: int) -> Bench:
    """So many sequences, whose prompts are computed."""
    bench = Bench(settings(), num_flights=num_flights)
    bench.submit(*(request(str(number), 3, max_tokens=9, seed=number) for number in range(count)))
    bench.schedule()
    bench.commit()
    return bench


def test_flights_share_what_decodes() -> None:
    bench = decoding(2, 5)
    assert shape(bench.schedule_beside()) == [("0", 3, 1), ("1", 3, 1), ("2", 3, 1)]
    assert shape(bench.schedule_beside()) == [("3", 3, 1), ("4", 3, 1)]
    bench.commit()
    assert shape(bench.schedule_beside()) == [("0", 4, 1), ("1", 4, 1), ("2", 4, 1)]
    assert set(bench.drain_pipelined()) <= {1, 2}
    bench.check_end()


def test_there_is_no_step_for_whom_all_wait() -> None:
    bench = decoding(3, 1)
    assert shape(bench.schedule_beside()) == [("0", 3, 1)]
    assert bench.schedule_beside() is None, "its next token is not known yet"
    bench.submit(request("new", 4, max_tokens=2))
    assert shape(bench.schedule_beside()) == [("new", 0, 4)], "a newcomer need not wait"
    bench.drain_pipelined()
    bench.check_end()


def test_chunks_of_one_prompt_follow_each_other() -> None:
    bench = Bench(settings(max_batch_tokens=8), num_flights=3)
    bench.submit(request("a", 21, max_tokens=2))
    plans = [bench.schedule_beside() for _ in range(3)]
    assert [shape(plan) for plan in plans] == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 5)]]
    for _ in range(2):
        bench.commit()
        assert bench.schedule_beside() is None
    bench.commit()
    bench.drain_pipelined()
    bench.check_end()


def test_a_common_prefix_in_flight_is_waited_for() -> None:
    bench = Bench(settings(prefix_wait_tokens=8), num_flights=2)
    bench.submit(request("a", 20, max_tokens=2))
    bench.schedule_beside()
    bench.submit(request("b", 20, max_tokens=2))
    assert bench.schedule_beside() is None
    bench.commit()
    assert ("b", 16, 4) in shape(bench.schedule_beside())
    bench.drain_pipelined()
    bench.check_end()


def test_nobody_waits_for_a_prefix_that_was_given_up() -> None:
    """The hashes of a cancelled prompt must not be handed on from flight to flight."""
    bench = Bench(settings(prefix_wait_tokens=8, max_batch_tokens=8, max_batch_size=4), num_flights=2)
    bench.submit(request("busy", [7, 8, 9], max_tokens=40))
    bench.schedule()
    bench.commit()
    bench.submit(request("a", 30, max_tokens=2))
    bench.schedule_beside()
    bench.schedule_beside()
    bench.cancel("a")
    bench.submit(request("b", 30, max_tokens=2))
    for _ in range(12):
        bench.commit()
        while len(bench.plans) < 2 and bench.schedule_beside() is not None:
            pass
    assert bench.finish("b") is FinishReason.LENGTH
    bench.drain_pipelined()
    bench.check_end()


def test_a_cancel_and_a_failure_with_steps_in_flight() -> None:
    bench = decoding(2, 4)
    bench.schedule_beside()
    bench.schedule_beside()
    bench.cancel("3")
    assert [event.key for event in bench.commit()] == ["0", "1"]
    bench.schedule_beside()
    bench.fail("a rank died")
    assert [bench.finish(key) for key in "0123"] == [FinishReason.FAILED] * 3 + [FinishReason.CANCELLED]
    bench.check_end()


def test_more_plans_than_flights_are_a_mistake() -> None:
    bench = decoding(2, 4)
    bench.schedule_beside()
    bench.schedule_beside()
    with pytest.raises(AssertionError, match="2 plans are in flight"):
        bench.schedule_beside()


@pytest.mark.parametrize("num_flights", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_equal_to_those_of_one_step_at_a_time(seed: int, num_flights: int) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, str(index), 100.0) for index in range(40)]
    limits = settings(num_blocks=24, max_batch_tokens=20, max_waiting=64)
    plain, pipelined = Bench(limits), Bench(limits, num_flights=num_flights)
    for bench in (plain, pipelined):
        bench.submit(*requests)
    plain.drain()
    in_flight = pipelined.drain_pipelined()
    assert max(in_flight) == num_flights
    for bench in (plain, pipelined):
        bench.check_end()
        check_prompt_logprobs(bench)
    assert [plain.output(one.key) for one in requests] == [pipelined.output(one.key) for one in requests]
    assert [plain.finish(one.key) for one in requests] == [pipelined.finish(one.key) for one in requests]


def test_nobody_is_left_behind() -> None:
    """With a slow group of sequences and newcomers, every sequence gets its turn."""
    bench = decoding(3, 7)
    for _ in range(6):
        while len(bench.plans) < 3 and bench.schedule_beside() is not None:
            pass
        bench.commit()
    assert all(len(bench.output(str(number))) >= 2 for number in range(7))
