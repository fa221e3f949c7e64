"""Continuous batching: what goes into a step, and in which order."""

from __future__ import annotations

import pytest

from scheduler.batcher import Batcher
from scheduler.plan import FinishReason, StepPlan, StepResult
from scheduler.policy import priority_then_deadline
from scheduler.request import Request
from scheduler.sequence import Sequence
from tests.unit.scheduler.harness import Bench, Clock, request, settings


def shape(plan: StepPlan) -> list[tuple[str, int]]:
    return [(scheduled.key, scheduled.num_tokens) for scheduled in plan.sequences]


def test_one_request_alone() -> None:
    bench = Bench(settings())
    bench.submit(request("a", 5, max_tokens=3))
    assert [shape(bench.step()) for _ in range(3)] == [[("a", 5)], [("a", 1)], [("a", 1)]]
    assert not bench.batcher.has_work
    assert bench.schedule() is None
    assert [event.position for event in bench.events["a"]] == [0, 1, 2]
    assert bench.finish("a") is FinishReason.LENGTH
    bench.check_end()


def test_plans_carry_generation_and_step() -> None:
    bench = Bench(settings())
    bench.submit(request("a", max_tokens=2))
    assert [(plan.generation, plan.step) for plan in (bench.step(), bench.step())] == [(3, 1), (3, 2)]


def test_history_is_the_live_list() -> None:
    bench = Bench(settings())
    bench.submit(request("a", max_tokens=2))
    first = bench.step().sequences[0]
    second = bench.step().sequences[0]
    assert first.history is second.history
    assert second.position == 1


def test_a_long_prompt_is_prefilled_in_chunks_behind_decodes() -> None:
    bench = Bench(settings(max_batch_tokens=8))
    bench.submit(request("a", 3, max_tokens=9))
    bench.step()
    bench.submit(request("b", 16, max_tokens=4))
    plans = [bench.schedule()]
    assert plans[0] is not None
    assert shape(plans[0]) == [("a", 1), ("b", 7)]
    assert [scheduled.samples for scheduled in plans[0].sequences] == [True, False]
    assert [scheduled.num_logits for scheduled in plans[0].sequences] == [1, 0]
    bench.commit()
    assert shape(bench.step()) == [("a", 1), ("b", 7)]
    assert shape(bench.step()) == [("a", 1), ("b", 2)]
    assert shape(bench.step()) == [("a", 1), ("b", 1)]
    bench.drain()
    bench.check_end()


def test_a_new_prompt_of_one_token_stands_with_the_decodes() -> None:
    bench = Bench(settings())
    bench.submit(request("a", 3), request("b", 1))
    assert shape(bench.step()) == [("b", 1), ("a", 3)]


def test_at_most_max_batch_size_run() -> None:
    bench = Bench(settings(max_batch_size=2))
    bench.submit(*(request(key, max_tokens=2) for key in "abc"))
    assert [key for key, _ in shape(bench.step())] == ["a", "b"]
    assert [key for key, _ in shape(bench.step())] == ["a", "b"]
    assert [key for key, _ in shape(bench.step())] == ["c"]


def test_every_running_sequence_gets_a_token_into_every_step() -> None:
    bench = Bench(settings(max_batch_size=8, max_batch_tokens=3))
    bench.submit(*(request(str(number), 2, max_tokens=20) for number in range(6)))
    assert bench.limits.max_running == 3
    for _ in range(12):
        running = {sequence.request.key for sequence in bench.batcher._running}
        assert running <= {key for key, _ in shape(bench.step())}
    bench.drain()
    bench.check_end()


def test_the_queue_is_in_order_of_priority_then_arrival() -> None:
    bench = Bench(settings(max_batch_size=1))
    bench.submit(
        request("low", max_tokens=1, priority=1, arrival_s=100.0),
        request("late", max_tokens=1, arrival_s=102.0),
        request("early", max_tokens=1, arrival_s=101.0),
        request("early too", max_tokens=1, arrival_s=101.0),
    )
    assert [bench.step().sequences[0].key for _ in range(4)] == ["early", "early too", "late", "low"]


def test_another_order_can_be_given() -> None:
    bench = Bench(settings(max_batch_size=1), order=priority_then_deadline)
    bench.submit(request("a", max_tokens=1), request("b", max_tokens=1, deadline_s=200.0))
    assert bench.step().sequences[0].key == "b"


class LastInFirstOut:
    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._sequences)

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self._sequences)

    def push(self, sequence: Sequence) -> None:
        self._sequences.append(sequence)

    def peek(self) -> Sequence | None:
        return self._sequences[-1] if self._sequences else None

    def remove(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)

    def ahead_of(self, sequence: Sequence) -> tuple[int, int]:
        return 0, 0


def test_another_queue_can_be_given() -> None:
    bench = Bench(settings(max_batch_size=1, num_blocks=8), queue=LastInFirstOut())
    bench.submit(*(request(key, max_tokens=3) for key in "abc"))
    assert bench.step().sequences[0].key == "c"
    bench.drain()
    bench.check_end()


def test_a_large_head_of_the_queue_is_not_overtaken() -> None:
    bench = Bench(settings(num_blocks=8))
    bench.submit(request("a", 12, max_tokens=20))
    bench.step()
    bench.submit(request("large", 28, max_tokens=2), request("small", 1, max_tokens=2))
    while bench.finish("a") is None:
        assert [key for key, _ in shape(bench.step())] == ["a"]
    assert bench.step().sequences[0].key == "large"
    bench.drain()
    bench.check_end()


def test_admission_leaves_each_running_sequence_a_block_to_grow_into() -> None:
    bench = Bench(settings(num_blocks=5))
    bench.submit(request("a", 8, max_tokens=8), request("b", 12, max_tokens=1))
    assert shape(bench.step()) == [("a", 8)]
    bench.drain()
    assert bench.batcher.load().num_preemptions == 0


def test_load() -> None:
    bench = Bench(settings(max_batch_size=1))
    bench.submit(request("a", 5, max_tokens=2), request("b", 7), request("c", 2, output_token_ids=(1,)))
    bench.schedule()
    bench.clock.now_s += 0.25
    bench.commit()
    load = bench.batcher.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 2, 10)
    assert (load.num_free_blocks, load.num_blocks, load.step_s) == (62, 64, 0.25)


def test_the_first_token_says_how_long_it_took() -> None:
    bench = Bench(settings(max_batch_tokens=4))
    bench.submit(request("a", 6, arrival_s=98.0, max_tokens=2))
    for _ in range(3):
        bench.schedule()
        bench.clock.now_s += 1.0
        bench.commit()
    first, second = bench.events["a"]
    assert (first.queue_s, first.prefill_s) == (2.0, 2.0)
    assert (second.queue_s, second.prefill_s) == (None, None)


def test_a_key_is_open_once() -> None:
    bench = Bench(settings())
    bench.submit(request("a"))
    with pytest.raises(ValueError, match="'a' is already open"):
        bench.batcher.submit(request("a"))


def test_plans_are_committed_one_by_one() -> None:
    batcher = Batcher(settings(), clock=Clock())
    batcher.submit(request("a"))
    plan = batcher.schedule()
    assert plan is not None
    with pytest.raises(AssertionError, match="not committed"):
        batcher.schedule()
    other = StepPlan(generation=plan.generation, step=plan.step, sequences=plan.sequences)
    with pytest.raises(AssertionError, match="not the plan in flight"):
        batcher.commit(other, StepResult(()))


@pytest.mark.parametrize("name", ["max_batch_size", "max_batch_tokens", "num_blocks", "max_waiting"])
def test_settings_name_the_field_at_fault(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        settings(**{name: 0})


def test_outputs_do_not_depend_on_the_company() -> None:
    requests: list[Request] = [
        request(str(number), [number, 3, number], max_tokens=10, eos_token_ids=frozenset({1})) for number in range(20)
    ]
    together = Bench(settings(max_batch_tokens=7))
    together.submit(*requests)
    together.drain()
    together.check_end()
