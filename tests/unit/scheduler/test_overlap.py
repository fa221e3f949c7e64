"""Plans made while the step before them runs: the same outputs as without, whatever ends in between."""

from __future__ import annotations

import random

import pytest

from scheduler.plan import FinishReason, StepPlan
from tests.unit.scheduler.harness import Bench, request, settings
from tests.unit.scheduler.test_ends import AT, PROMPT, STOP
from tests.unit.scheduler.test_traces import check_prompt_logprobs, random_request


def shape(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(one.key, one.num_computed, one.num_tokens) for one in plan.sequences]


def test_a_decode_is_planned_behind_the_step_that_makes_its_token() -> None:
    bench = Bench(settings())
    bench.submit(request("a", 5, max_tokens=3))
    assert shape(bench.schedule()) == [("a", 0, 5)]
    ahead = bench.schedule_ahead()
    assert shape(ahead) == [("a", 5, 1)]
    assert ahead is not None
    assert ahead.sequences[0].position == 1
    bench.commit()
    assert shape(bench.schedule_ahead()) == [("a", 6, 1)]
    bench.commit()
    assert bench.schedule_ahead() is None, "the last token is known to be the last"
    bench.commit()
    assert not bench.batcher.has_work
    bench.check_end()


def test_chunks_go_on_and_newcomers_enter_ahead() -> None:
    bench = Bench(settings(max_batch_tokens=8, prefix_cache=False))
    bench.submit(request("a", 18, max_tokens=2))
    bench.schedule()
    bench.submit(request("b", 3, max_tokens=1))
    assert shape(bench.schedule_ahead()) == [("b", 0, 3), ("a", 8, 5)]
    bench.commit()
    assert shape(bench.schedule_ahead()) == [("a", 13, 5)]
    bench.drain_overlapped()
    bench.check_end()


@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_equal_to_those_of_the_plain_loop(seed: int) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, str(index), 100.0) for index in range(40)]
    benches = [Bench(settings(num_blocks=24, max_batch_tokens=20, max_waiting=64)) for _ in range(2)]
    for bench in benches:
        bench.submit(*requests)
    plain, overlapped = benches
    plain.drain()
    num_ahead, num_plain = overlapped.drain_overlapped()
    assert num_ahead > 2 * num_plain
    for bench in benches:
        bench.check_end()
        check_prompt_logprobs(bench)
    assert [plain.output(one.key) for one in requests] == [overlapped.output(one.key) for one in requests]
    assert [plain.finish(one.key) for one in requests] == [overlapped.finish(one.key) for one in requests]


def test_what_a_stop_token_ends_is_dropped_from_the_next_step() -> None:
    bench = Bench(settings())
    bench.submit(request("a", PROMPT, max_tokens=12, eos_token_ids=frozenset({STOP})))
    bench.schedule()
    for _ in range(AT):
        assert bench.schedule_ahead() is not None
        bench.commit()
    assert bench.schedule_ahead() is not None
    bench.commit()
    assert bench.finish("a") is FinishReason.STOP
    assert not bench.batcher.has_work
    assert bench.batcher.load().num_free_blocks < 64, "the step in flight still writes"
    assert bench.commit() == []
    bench.check_end()


def test_a_cancel_with_two_steps_in_flight() -> None:
    bench = Bench(settings())
    bench.submit(request("a", 5), request("b", 6))
    bench.schedule()
    bench.schedule_ahead()
    bench.cancel("a")
    assert [event.key for event in bench.commit()] == ["b"]
    held = bench.batcher.load().num_free_blocks
    assert [event.key for event in bench.commit()] == ["b"]
    assert bench.batcher.load().num_free_blocks == held + 2
    bench.drain_overlapped()
    bench.check_end()


def test_nobody_is_preempted_ahead() -> None:
    bench = Bench(settings(num_blocks=6, prefix_cache=False))
    bench.submit(request("a", 4, max_tokens=16), request("b", 4, max_tokens=16))
    _, num_plain = bench.drain_overlapped()
    assert bench.batcher.load().num_preemptions >= 1
    assert num_plain >= 2
    bench.check_end()


def test_a_failure_with_two_steps_in_flight() -> None:
    bench = Bench(settings())
    bench.submit(request("a"), request("b"))
    bench.schedule()
    bench.schedule_ahead()
    bench.cancel("b")
    bench.fail("a rank died")
    assert [bench.finish(key) for key in "ab"] == [FinishReason.FAILED, FinishReason.CANCELLED]
    bench.check_end()


def test_a_table_that_grows_ahead_is_another_list() -> None:
    bench = Bench(settings())
    bench.submit(request("a", 4, max_tokens=8))
    plan = bench.schedule()
    assert plan is not None
    table = plan.sequences[0].block_ids
    before = list(table)
    assert shape(bench.schedule_ahead()) == [("a", 4, 1)]
    assert list(table) == before
    bench.drain_overlapped()
    bench.check_end()


def test_plans_run_in_their_order() -> None:
    bench = Bench(settings())
    bench.submit(request("a"))
    with pytest.raises(AssertionError, match="0 plans are in flight"):
        bench.schedule_ahead()
    first, second = bench.schedule(), bench.schedule_ahead()
    assert first is not None
    assert second is not None
    assert (first.step, second.step) == (1, 2)
    with pytest.raises(AssertionError, match="2 plans are in flight"):
        bench.batcher.schedule_ahead()
    with pytest.raises(AssertionError, match="not the plan in flight"):
        bench.batcher.commit(second, bench.runner.run(first))
