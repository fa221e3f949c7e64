"""When blocks run out."""

from __future__ import annotations

from scheduler.plan import FinishReason
from tests.unit.scheduler.harness import Bench, request, settings


def test_the_newest_gives_its_blocks_back_and_is_computed_again() -> None:
    bench = Bench(settings(num_blocks=6, prefix_cache=False))
    bench.submit(request("a", 4, max_tokens=16), request("b", 4, max_tokens=16))
    first_to_wait = None
    while bench.finish("a") is None:
        keys = [scheduled.key for scheduled in bench.step().sequences]
        assert "a" in keys
        if "b" not in keys and first_to_wait is None:
            first_to_wait = len(bench.output("b"))
    assert first_to_wait
    assert bench.batcher.load().num_preemptions >= 1
    plan = bench.step()
    assert (plan.sequences[0].key, plan.sequences[0].num_computed) == ("b", 0)
    bench.drain()
    bench.check_end()


def test_the_lowest_priority_goes_first_even_if_it_is_the_oldest() -> None:
    bench = Bench(settings(num_blocks=6))
    bench.submit(request("low", 4, max_tokens=16, priority=1, arrival_s=90.0))
    bench.step()
    bench.submit(request("high", 4, max_tokens=16, priority=0, arrival_s=100.0))
    while bench.finish("high") is None:
        assert "high" in [scheduled.key for scheduled in bench.step().sequences]
    assert bench.finish("low") is None
    assert bench.batcher.load().num_preemptions >= 1
    bench.drain()
    bench.check_end()


def test_a_preempted_sequence_goes_before_what_came_after_it() -> None:
    bench = Bench(settings(num_blocks=6, max_batch_size=2))
    bench.submit(request("a", 4, max_tokens=16), request("b", 4, max_tokens=16), request("c", 4, max_tokens=1))
    bench.drain()
    ends = [key for key in "abc" if bench.finish(key) is FinishReason.LENGTH]
    assert ends == ["a", "b", "c"]
    bench.check_end()


def test_a_crowd_in_a_tiny_pool_is_served_in_the_end() -> None:
    bench = Bench(settings(num_blocks=5, max_batch_tokens=6))
    bench.submit(*(request(str(number), 1 + number % 9, max_tokens=11) for number in range(16)))
    num_steps = bench.drain()
    assert num_steps < 16 * (9 + 11)
    assert bench.batcher.load().num_preemptions > 0
    bench.check_end()


def test_a_preempted_sequence_has_waited_only_until_it_was_first_admitted() -> None:
    bench = Bench(settings(num_blocks=7, max_batch_tokens=2))
    bench.submit(request("a", 3, max_tokens=20))
    bench.step()
    bench.submit(request("b", 16, max_tokens=2))
    while bench.batcher.has_work:
        bench.clock.now_s += 1.0
        bench.step()
        if bench.batcher.load().num_preemptions == 0:
            assert bench.output("b") == []
    assert bench.batcher.load().num_preemptions >= 1
    assert [event.queue_s for event in bench.events["b"]] == [1.0, None]
    bench.check_end()


def test_a_sequence_that_fills_the_pool_ends_by_length() -> None:
    bench = Bench(settings(num_blocks=2, max_model_len=64))
    bench.submit(request("a", 5, max_tokens=30), request("b", 8, max_tokens=30))
    bench.drain()
    assert [len(bench.output(key)) for key in "ab"] == [4, 1]
    assert bench.finish("a") is FinishReason.LENGTH
    bench.check_end()
