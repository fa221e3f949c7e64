"""The step loop with a real batcher and steps that the test controls."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from scheduler.batcher import Batcher, BatcherSettings
from scheduler.plan import FinishReason, SequenceResult, StepPlan, StepResult
from scheduler.request import Request, SamplingParams
from tests.unit.workers.rank.outlets import Recorder
from workers.loop import Broken, StepLoop

Run = Callable[[StepPlan, str], StepResult]


def seven(plan: StepPlan, _: str = "") -> StepResult:
    """Every sequence that samples says 7."""
    return StepResult(tuple(SequenceResult(7 if sequence.samples else None) for sequence in plan.sequences))


class Gate:
    """A step that waits for the test."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()

    def __call__(self, plan: StepPlan, _: str) -> StepResult:
        self.entered.set()
        assert self.leave.wait(10)
        return seven(plan)


class Loops:
    def __init__(self, overlap: bool) -> None:
        self.overlap = overlap
        self.started: list[StepLoop] = []

    def __call__(self, run: Run, on_broken: Callable[[], None] = lambda: None) -> tuple[StepLoop, Recorder]:
        settings = BatcherSettings(
            max_batch_size=4, max_batch_tokens=16, max_model_len=64, block_size=4, num_blocks=64, max_waiting=4
        )
        batcher = Batcher(settings, clock=time.monotonic, generation=3)
        loop = StepLoop(batcher, run, rank=0, clock=time.monotonic, on_broken=on_broken, overlap=self.overlap)
        outlet = Recorder()
        loop.attach(outlet)
        loop.start()
        self.started.append(loop)
        return loop, outlet


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def start(request: pytest.FixtureRequest) -> Iterator[Loops]:
    """The two loops promise the same."""
    loops = Loops(request.param)
    yield loops
    for loop in loops.started:
        loop.stop(1)


def request(key: str, max_tokens: int = 3, **fields: object) -> Request:
    return Request(
        key=key,
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=max_tokens),
        arrival_s=time.monotonic(),
        **fields,  # type: ignore[arg-type]
    )


def test_tokens_come_in_one_batch_per_step(start: Loops) -> None:
    gate = Gate()
    loop, outlet = start(gate)
    loop.submit(request("first"), outlet)
    assert gate.entered.wait(10)
    for key in ("a", "b"):
        loop.submit(request(key), outlet)
    gate.leave.set()
    outlet.wait(lambda: outlet.finished("a") and outlet.finished("b"))
    assert [(event.position, event.token_id) for event in outlet.of("a")] == [(0, 7), (1, 7), (2, 7)]
    together = [batch for batch in outlet.batches if {"a", "b"} <= {event.key for event in batch.events}]
    assert len(together) == 3
    assert outlet.batches[-1].load.num_running == 0
    steps = [batch.step for batch in outlet.batches]
    assert steps == sorted(steps)


def test_the_loop_sleeps_without_work_and_wakes_for_it(start: Loops) -> None:
    calls: list[int] = []

    def run(plan: StepPlan, _: str) -> StepResult:
        calls.append(plan.step)
        return seven(plan)

    loop, outlet = start(run)
    loop.submit(request("a", max_tokens=1), outlet)
    outlet.wait(lambda: outlet.finished("a"))
    loop.submit(request("b", max_tokens=1), outlet)
    outlet.wait(lambda: outlet.finished("b"))
    assert calls == [1, 2]


def test_a_cancel_during_a_step_counts_at_once(start: Loops) -> None:
    gate = Gate()
    loop, outlet = start(gate)
    loop.submit(request("a", max_tokens=40), outlet)
    assert gate.entered.wait(10)
    loop.cancel("a")
    loop.cancel("never heard of")
    gate.leave.set()
    outlet.wait(lambda: outlet.finished("a"))
    assert outlet.of("a")[-1].finish is FinishReason.CANCELLED
    assert len(outlet.of("a")) == 2  # the step's token, and the end


def test_refusals_do_not_wait_for_a_step(start: Loops) -> None:
    loop, outlet = start(seven)
    loop.submit(dataclasses.replace(request("too long"), prompt_token_ids=(1,) * 65), outlet)
    outlet.wait(lambda: outlet.finished("too long"))
    assert outlet.events[0].finish is FinishReason.REFUSED


def test_a_failing_step_fails_everything_and_says_why(start: Loops) -> None:
    broken = threading.Event()

    def run(plan: StepPlan, _: str) -> StepResult:
        if plan.step == 2:
            raise RuntimeError("peer closed the connection")
        return seven(plan)

    loop, outlet = start(run, broken.set)
    loop.submit(request("a", max_tokens=40), outlet)
    outlet.wait(lambda: outlet.ended)
    last = outlet.of("a")[-1]
    assert (last.finish, last.position, last.error) == (FinishReason.FAILED, 1, "the engine failed")
    assert loop.reason == "RuntimeError: peer closed the connection"
    assert broken.wait(10)
    loop.submit(request("late"), outlet)
    outlet.wait(lambda: outlet.finished("late"))
    assert outlet.of("late")[-1].finish is FinishReason.FAILED
    with pytest.raises(Broken, match="peer closed"):
        loop.probe(10)


def test_a_hanging_step_fails_everything_without_it(start: Loops) -> None:
    gate = Gate()
    loop, outlet = start(gate)
    loop.submit(request("a"), outlet)
    assert gate.entered.wait(10)
    loop.submit(request("waiting in the inbox"), outlet)
    loop.fail("rank 1 has gone")
    outlet.wait(lambda: outlet.ended and outlet.finished("a") and outlet.finished("waiting in the inbox"))
    gate.leave.set()
    loop.stop(10)
    assert len(outlet.events) == 2  # what the step made in the end is dropped
    assert loop.reason == "rank 1 has gone"


def test_a_probe_needs_a_token_of_its_own_in_an_idle_group(start: Loops) -> None:
    loop, outlet = start(seven)
    assert loop.probe(10) < 10
    assert outlet.events == []  # and nobody hears of it
    assert any(batch.step == 1 for batch in outlet.batches)


def test_a_probe_takes_any_token_of_a_full_group(start: Loops) -> None:
    gate = Gate()
    loop, outlet = start(gate)
    for number in range(4):
        loop.submit(request(f"{number}", max_tokens=50), outlet)
    assert gate.entered.wait(10)
    with pytest.raises(TimeoutError):
        loop.probe(0.01)
    gate.leave.set()
    assert loop.probe(10) < 10


def test_draining_waits_for_what_is_open(start: Loops) -> None:
    gate = Gate()
    loop, outlet = start(gate)
    loop.submit(request("a"), outlet)
    assert gate.entered.wait(10)
    assert not loop.drain(0.01)
    loop.submit(request("late"), outlet)
    gate.leave.set()
    assert loop.drain(10)
    outlet.wait(lambda: outlet.finished("late"))
    assert outlet.of("late")[-1].error == "the engine is draining"
    assert outlet.of("a")[-1].finish is FinishReason.LENGTH


def test_an_outlet_may_speak_to_the_loop_from_another_thread_while_it_delivers(start: Loops) -> None:
    loop, _ = start(seven)

    class Impatient(Recorder):
        def deliver(self, batch: object) -> None:
            canceller = threading.Thread(target=loop.cancel, args=("a",))
            canceller.start()
            canceller.join(10)
            assert not canceller.is_alive()
            super().deliver(batch)  # type: ignore[arg-type]

    outlet = Impatient()
    loop.submit(request("a", max_tokens=40), outlet)
    outlet.wait(lambda: outlet.finished("a"))
