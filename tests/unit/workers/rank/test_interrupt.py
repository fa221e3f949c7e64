"""A step loop that is interrupted and goes on: nothing is lost, nothing is said twice."""

from __future__ import annotations

import threading
import time

import pytest

from scheduler.batcher import Batcher, BatcherSettings
from scheduler.plan import FinishReason, SequenceResult, StepPlan, StepResult
from scheduler.request import Request, SamplingParams
from tests.unit.workers.rank.outlets import Recorder
from workers.loop import StepLoop


class Steps:
    """Every sequence says its position; the steps of these numbers fail once with an error."""

    def __init__(self, failing: dict[int, Exception]) -> None:
        self.failing = failing
        self.ran: list[tuple[int, int]] = []  # generation, step

    def __call__(self, plan: StepPlan, _: str) -> StepResult:
        self.ran.append((plan.generation, plan.step))
        if (error := self.failing.pop(plan.step, None)) is not None:
            raise error
        return StepResult(tuple(SequenceResult(s.position + 5 if s.samples else None) for s in plan.sequences))


@pytest.mark.parametrize("overlap", [False, True])
def test_interrupted_steps_are_run_again(overlap: bool) -> None:
    steps = Steps({step: RuntimeError("a peer has gone") for step in (2, 7, 8)})
    settings = BatcherSettings(max_batch_size=4, max_batch_tokens=16, max_model_len=64, block_size=4, num_blocks=64)
    batcher = Batcher(settings, clock=time.monotonic, generation=1)
    reasons: list[str] = []
    interrupted = threading.Semaphore(0)

    def on_interrupted(reason: str) -> None:
        reasons.append(reason)
        interrupted.release()

    loop = StepLoop(batcher, steps, rank=0, clock=time.monotonic, on_interrupted=on_interrupted, overlap=overlap)
    outlet = Recorder()
    loop.attach(outlet)
    loop.start()
    for key in ("a", "b"):
        sampling = SamplingParams(max_tokens=12, ignore_eos=True)
        loop.submit(Request(key=key, prompt_token_ids=(1, 2, 3), sampling=sampling, arrival_s=time.monotonic()), outlet)
    for generation in (2, 3, 4):
        assert interrupted.acquire(timeout=10)
        assert loop.rest(10)
        num_ran = len(steps.ran)
        if generation == 3:
            loop.submit(Request(key="c", prompt_token_ids=(1,), sampling=sampling, arrival_s=time.monotonic()), outlet)
        assert len(steps.ran) == num_ran, "a loop at rest runs nothing"
        loop.resume(generation)
    outlet.wait(lambda: all(outlet.finished(key) for key in ("a", "b", "c")))
    for key in ("a", "b", "c"):
        assert [(event.position, event.token_id) for event in outlet.of(key)] == [(n, n + 5) for n in range(12)]
        assert outlet.of(key)[-1].finish is FinishReason.LENGTH
    assert len(reasons) == 3
    assert [step for _, step in steps.ran].count(2) == 2
    batcher.check_integrity()
    loop.stop(10)


def test_our_own_mistakes_break_the_loop() -> None:
    steps = Steps({2: ValueError("ours")})
    settings = BatcherSettings(max_batch_size=4, max_batch_tokens=16, max_model_len=64, block_size=4, num_blocks=64)
    batcher = Batcher(settings, clock=time.monotonic)
    loop = StepLoop(batcher, steps, rank=0, clock=time.monotonic, on_interrupted=lambda _: None)
    outlet = Recorder()
    loop.attach(outlet)
    loop.start()
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    loop.submit(Request(key="a", prompt_token_ids=(1, 2, 3), sampling=sampling, arrival_s=0.0), outlet)
    outlet.wait(lambda: outlet.finished("a"))
    assert outlet.of("a")[-1].finish is FinishReason.FAILED
    loop.stop(10)
