"""The step loop of a pipeline: several steps under way, each on sequences of its own.

    while fewer than `depth` are:   begin(batcher.schedule_beside())
    as soon as the oldest is back:  events = batcher.commit(plan, collect())

A request that comes in, a result, and another group's beat each wake it; it never waits for one of them alone.

A loop that was interrupted begins what was under way again, in the same order: none of it was committed, and every
stage writes the same slots once more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from scheduler.batcher import Batcher
from scheduler.plan import StepPlan, StepResult
from workers.loop import MOST_ATTEMPTS, Company, StepLoop
from workers.spans import record_step

__all__ = ["Pipeline", "PipelinedLoop"]


class Pipeline(Company, Protocol):
    """Who takes steps through the stages; see `workers.pipeline.FirstStage`."""

    @property
    def depth(self) -> int: ...

    @property
    def ready(self) -> bool: ...

    def begin(self, plan: StepPlan, traceparent: str) -> None: ...

    def collect(self) -> StepResult: ...


class PipelinedLoop(StepLoop):
    """`wake` must be called when a result comes in."""

    def __init__(
        self,
        batcher: Batcher,
        pipeline: Pipeline,
        *,
        rank: int,
        clock: Callable[[], float],
        on_broken: Callable[[], None] = lambda: None,
        on_interrupted: Callable[[str], None] | None = None,
        on_step: Callable[[StepPlan, float], None] | None = None,
    ) -> None:
        super().__init__(
            batcher,
            self._run_to_its_end,
            rank=rank,
            clock=clock,
            company=pipeline,
            on_broken=on_broken,
            on_interrupted=on_interrupted,
            on_step=on_step,
        )
        assert batcher.num_flights == pipeline.depth
        self._pipeline = pipeline
        self._under_way: deque[tuple[StepPlan, str, float]] = deque()  # with traceparents, and when each began
        self._ended_s = 0.0
        self._tried = False  # nobody was free for one more step, and nothing has changed since

    def resume(self, generation: int) -> None:
        """See `StepLoop.resume`: a loop at rest begins with all steps that were under way."""
        self._unfinished.extendleft((plan, traceparent) for plan, traceparent, _ in reversed(self._under_way))
        self._under_way.clear()
        self._tried = False
        if self._unfinished:
            self._num_attempts += 1
            if self._num_attempts > MOST_ATTEMPTS:
                self.fail(f"steps were interrupted {self._num_attempts} times, and none came to its end")
        super().resume(generation)

    def _run_to_its_end(self, plan: StepPlan, traceparent: str) -> StepResult:
        raise AssertionError("a pipeline begins steps and collects their results")

    @property
    def _has_step(self) -> bool:
        if self._pipeline.ready or self._pipeline.pending:
            return True
        return self._has_room and (self._batcher.has_work or bool(self._unfinished)) and not self._tried

    @property
    def _has_room(self) -> bool:
        return len(self._under_way) < self._pipeline.depth

    def _once(self, inbox: list[Callable[[], None]]) -> None:
        """At most one step begun, and one ended."""
        with self._state:
            for action in inbox:
                action()
            plan, traceparent = self._next_beside() if self._has_room and self._broken is None else (None, "")
            self._tried = plan is None
            if events := self._batcher.take_events():
                self._deliver(events)
        if plan is not None:
            self._set_out(plan, traceparent)
        elif self._pipeline.pending and self._broken is None:
            self._pipeline.keep_step()
        if self._pipeline.ready and self._broken is None:
            self._come_home()

    def _next_beside(self) -> tuple[StepPlan | None, str]:
        """What is to be begun again, or one more step; and its traceparent."""
        if self._unfinished:
            return self._unfinished.popleft()
        plan = self._batcher.schedule_beside()
        return plan, self._traceparent(plan) if plan is not None and self._num_traced else ""

    def _set_out(self, plan: StepPlan, traceparent: str) -> None:
        start_ns = time.time_ns() if traceparent else 0
        self._under_way.append((plan, traceparent, self.clock()))
        self._pipeline.begin(plan, traceparent)
        if traceparent:
            record_step(
                traceparent,
                rank=self._rank,
                step=plan.step,
                num_tokens=plan.num_tokens,
                num_sequences=len(plan.sequences),
                start_ns=start_ns,
            )

    def _come_home(self) -> None:
        """A step counts from its beginning or from the end of the one before, so that steps add up to time passed."""
        result = self._pipeline.collect()
        plan, _, began_s = self._under_way.popleft()
        now_s = self.clock()
        step_s, self._ended_s = now_s - max(began_s, self._ended_s), now_s
        self._tried = False
        self._num_attempts = 0
        self._take_in(plan, result, step_s, None)
        if self._on_step is not None:
            self._on_step(plan, step_s)
