"""A pipeline's loop under random traces: the outputs of one step at a time, and invariants of what is in flight."""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from collections.abc import Callable

import pytest

from scheduler.batcher import Batcher
from scheduler.plan import FinishReason, StepPlan, StepResult
from scheduler.request import Request
from tests.unit.scheduler.harness import NO_END, Clock, Runner, expected_output
from tests.unit.scheduler.harness import request as make_request
from tests.unit.scheduler.harness import settings as limits
from tests.unit.scheduler.test_traces import random_request
from tests.unit.workers.rank.outlets import Recorder
from workers.loop import Broken
from workers.pipelined_loop import PipelinedLoop


class Stages:
    """A pipeline whose steps end when the test says so; looks at every step that begins.

    With `late` they all end, but only when no other one can be begun. `faults` are called as steps begin, by how many
    have begun.
    """

    imbalance = 0.0
    pending = False

    def __init__(self, depth: int, batcher: Batcher, *, late: bool = False) -> None:
        self.depth = depth
        self.late = late
        self.faults: dict[int, Callable[[], None]] = {}
        self.most_interrupted = 0  # steps that were in flight at an interruption
        self._asked = -1
        self.full = threading.Event()  # as many steps are in flight as there may be
        self.num_steps = 0
        self.begun = threading.Semaphore(0)
        self.wake: Callable[[], None] = lambda: None
        self._batcher = batcher
        self._runner = Runner(batcher.settings.block_size)
        self._flights: deque[tuple[StepPlan, StepResult]] = deque()
        self._lock = threading.Lock()
        self._num_ended = 0
        self._all_end = False

    @property
    def ready(self) -> bool:
        with self._lock:
            if self.late:  # asked twice without a step begun meanwhile: there is none
                asked, self._asked = self._asked, self.num_steps
                return bool(self._flights) and (len(self._flights) == self.depth or asked == self.num_steps)
            return bool(self._flights) and (self._all_end or self._num_ended > 0)

    def end_one(self) -> None:
        """The oldest step that is in flight, or the next one."""
        with self._lock:
            self._num_ended += 1
        self.wake()

    def end_all(self) -> None:
        with self._lock:
            self._all_end = True
        self.wake()

    def begin(self, plan: StepPlan, traceparent: str) -> None:
        assert not traceparent
        self._check(plan)
        self.num_steps += 1
        fault = self.faults.pop(self.num_steps, None)
        if fault is not None:
            self.most_interrupted = max(self.most_interrupted, len(self._flights) + 1)
        if fault is not None and self.num_steps % 2:
            fault()  # before any stage has run it
        result = self._runner.run(plan)  # every stage takes the steps in their order
        with self._lock:
            self._flights.append((plan, result))
        if fault is not None:
            fault()
        self.begun.release()
        if len(self._flights) == self.depth:
            self.full.set()

    def collect(self) -> StepResult:
        with self._lock:
            self._num_ended -= not (self._all_end or self.late)
            return self._flights.popleft()[1]

    def regrouped(self) -> None:
        """What was in flight is lost; some stages have run it, and the slots are as they left them."""
        with self._lock:
            self._flights.clear()
            self._num_ended = 0

    def keep_step(self) -> None:
        raise AssertionError("there are no other groups")

    def _check(self, plan: StepPlan) -> None:
        """From the loop's thread, which owns the batcher."""
        assert len(self._flights) < self.depth
        self._batcher.check_integrity()
        for other, _ in self._flights:
            assert other.step < plan.step
            earlier = {sequence.key: sequence for sequence in other.sequences}
            for sequence in plan.sequences:
                if before := earlier.get(sequence.key):
                    assert not before.samples, "its next token is not known yet"
                    assert before.num_computed + before.num_tokens <= sequence.num_computed


class Case:
    """A loop with `depth` steps in flight over a pool that holds a few sequences."""

    def __init__(self, depth: int, *, late: bool = False, **changes: int) -> None:
        self.limits = limits(**{"num_blocks": 24, "max_batch_tokens": 20, "max_waiting": 64, **changes})
        self.clock = Clock()
        self.batcher = Batcher(self.limits, clock=self.clock, generation=1, num_flights=depth)
        self.stages = Stages(depth, self.batcher, late=late)
        self.interrupted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.loop = PipelinedLoop(
            self.batcher, self.stages, rank=0, clock=self.clock, on_interrupted=self.interrupted.put
        )
        self.stages.wake = self.loop.wake
        self.outlet = Recorder()
        self.requests: dict[str, Request] = {}
        self.loop.attach(self.outlet)
        self.loop.start()

    def submit(self, one: Request) -> None:
        self.requests[one.key] = one
        self.loop.submit(one, self.outlet)

    def wait_for_all(self) -> None:
        self.outlet.wait(lambda: all(self.outlet.finished(key) for key in self.requests))

    def check(self) -> None:
        """Every output is that of the request alone, or its beginning where it was ended from outside."""
        for key, wanted in self.requests.items():
            events = self.outlet.of(key)
            assert [event.position for event in events if event.token_id is not None] == list(
                range(sum(event.token_id is not None for event in events))
            )
            assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True]
            tokens = [event.token_id for event in events if event.token_id is not None]
            output, end = expected_output(wanted, self.limits)
            finish = events[-1].finish
            if finish in (*NO_END, FinishReason.REFUSED):
                assert tokens == output[: len(tokens)]
            else:
                assert (tokens, finish) == (output, end)

    def stop(self) -> None:
        self.stages.end_all()
        self.loop.stop(10)


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_random_traces(seed: int, depth: int) -> None:
    rng = random.Random(seed)
    case = Case(depth)
    waiting = [random_request(rng, str(number), 100.0) for number in range(50)]
    # Some come while others are on their way, steps end late, and anybody may be cancelled at any moment.
    while waiting:
        act = rng.random()
        if act < 0.4:
            case.submit(waiting.pop())
        elif act < 0.5 and case.requests:
            case.loop.cancel(rng.choice(list(case.requests)))
        else:
            case.stages.end_one()
    case.stages.end_all()
    case.wait_for_all()
    case.stop()
    case.check()
    assert case.batcher.load().num_free_blocks == case.limits.num_blocks
    finishes = {case.outlet.of(key)[-1].finish for key in case.requests}
    assert {FinishReason.STOP, FinishReason.LENGTH} <= finishes


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_interrupted_traces(seed: int, depth: int) -> None:
    """Steps fail on their way and others' deaths interrupt them, at any moment: every output is the undisturbed one."""
    rng = random.Random(seed)
    case = Case(depth, late=True)
    generations = [1]

    def fail() -> None:
        raise RuntimeError("a peer has gone")

    for moment in rng.sample(range(2, 60), 6):
        case.stages.faults[moment] = rng.choice([fail, lambda: case.loop.interrupt("rank 7 has gone")])
    leader = threading.Thread(target=_lead, args=(case, generations))
    leader.start()
    for number in range(50):
        case.submit(random_request(rng, str(number), 100.0))
        if rng.random() < 0.2:
            case.loop.cancel(rng.choice(list(case.requests)))
    case.wait_for_all()
    case.interrupted.put(None)
    leader.join(10)
    case.stop()
    case.check()
    assert case.loop.reason == "stopped"
    assert len(generations) == 7
    assert case.stages.most_interrupted >= 2
    assert case.batcher.load().num_free_blocks == case.limits.num_blocks


def _lead(case: Case, generations: list[int]) -> None:
    """As a leader would: whenever the loop rests, all stages meet anew."""
    while case.interrupted.get() is not None:
        assert case.loop.rest(10)
        case.stages.regrouped()
        generations.append(generations[-1] + 1)
        case.loop.resume(generations[-1])


def test_steps_that_never_come_to_an_end_break_the_loop_after_all() -> None:
    case = Case(2)
    case.submit(make_request("a", 5, max_tokens=3))
    for generation in range(2, 40):
        if case.loop.reason is not None:
            break
        assert case.stages.begun.acquire(timeout=10)
        case.loop.interrupt("the last stage does not bring the step to an end")
        assert case.loop.rest(10)
        case.stages.regrouped()
        case.loop.resume(generation)
    assert "none came to its end" in str(case.loop.reason)
    case.wait_for_all()
    assert case.outlet.of("a")[-1].finish is FinishReason.FAILED
    case.stop()


def test_all_stages_have_work_and_someone_is_preempted() -> None:
    case = Case(3, num_blocks=20, max_batch_size=6, max_batch_tokens=12)
    for number in range(16):
        # Prompts without a common beginning, for which one would wait.
        case.submit(make_request(str(number), [number, *range(6)], max_tokens=20))
    assert case.stages.full.wait(10), "as many steps as stages are begun before the first one ends"
    case.stages.end_all()
    case.wait_for_all()
    case.stop()
    case.check()
    assert case.batcher.load().num_preemptions > 0


def test_what_is_submitted_goes_out_while_others_are_in_flight() -> None:
    case = Case(2)
    case.submit(make_request("a", 5, max_tokens=3))
    assert case.stages.begun.acquire(timeout=10)
    case.submit(make_request("b", 5, max_tokens=3))
    assert case.stages.begun.acquire(timeout=10), "it waits for no result"
    case.submit(make_request("c", 5, max_tokens=3))
    assert not case.outlet.events, "no more steps than stages"
    assert case.stages.num_steps == 2
    case.stages.end_all()
    case.wait_for_all()
    case.stop()
    case.check()


def test_what_fails_with_steps_in_flight_fails_all_that_is_open() -> None:
    case = Case(3)
    for number in range(6):
        case.submit(make_request(str(number), 5, max_tokens=9))
    for _ in range(4):
        case.stages.end_one()
    case.outlet.wait(lambda: bool(case.outlet.events))
    case.loop.fail("rank 1 has gone")
    case.wait_for_all()
    case.stages.end_all()
    case.submit(make_request("late", 5, max_tokens=2))
    case.wait_for_all()
    case.stop()
    case.check()
    assert case.outlet.of("late")[-1].finish is FinishReason.FAILED
    with pytest.raises(Broken, match="rank 1"):
        case.loop.probe(1)
