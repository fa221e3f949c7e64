"""The step loop of a DP group: one thread that owns the batcher.

    plan = batcher.schedule()
    result = run(plan)
    events = batcher.commit(plan, result)

With `overlap` a step runs in a thread of its own, and what follows it is planned meanwhile:

    ahead = batcher.schedule_ahead()           while `plan` runs
    events = batcher.commit(plan, result)      then `ahead` begins, and its forerunner's tokens go out while it runs

The plain loop is the reference: both give every sequence the same tokens.

Others talk to it by its inbox (`submit`, `cancel`) and hear from it through outlets, one batch per step. It sleeps
while there is no work. Once `run` fails, or `fail` says that it never will return, everything open ends as FAILED
and the loop is broken for good.

Where other groups share the steps, a step that they keep from ending is no such failure: the loop rests, with all that
is open, until it may `resume` in a new generation. Then it runs that step again, which has not been committed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

from scheduler.batcher import Batcher, BatcherLoad
from scheduler.plan import Event, FinishReason, StepPlan, StepResult
from scheduler.request import Request, SamplingParams
from workers.beside import Beside
from workers.spans import SequenceSpans, record_step

__all__ = ["MOST_ATTEMPTS", "STOPPED", "Broken", "Company", "Outlet", "StepBatch", "StepLoop"]

log = logging.getLogger(__name__)

STOPPED = "stopped"
_FAILED = "the engine failed"
# What fails in so many generations fails by itself.
MOST_ATTEMPTS = 8


class Broken(RuntimeError):
    """The loop has ended; the message says why, for the operator."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step, or what happened before one, means for an outlet."""

    step: int
    events: list[Event]
    load: BatcherLoad


class Outlet(Protocol):
    """Who hears of sequences. Called from the loop's thread and others; must not block."""

    def deliver(self, batch: StepBatch) -> None: ...

    def broken(self) -> None:
        """Nothing follows: the loop is broken, and every open sequence was delivered as FAILED."""
        ...


class Company(Protocol):
    """The other DP groups, where steps are taken together: a group without work must then step as well."""

    @property
    def pending(self) -> bool:
        """Whether they wait for this group."""
        ...

    @property
    def imbalance(self) -> float:
        """What the fullest group brought to the last steps, over the mean; 0 where steps are taken alone."""
        ...

    def keep_step(self) -> None:
        """Joins them without work of one's own. Raises whatever keeps the step from ending."""
        ...


@dataclass(slots=True)
class _Open:
    outlet: Outlet | None
    spans: SequenceSpans | None
    traceparent: str
    num_output_tokens: int


def _failed(key: str, num_output_tokens: int, error: str = _FAILED) -> Event:
    return Event(key=key, position=num_output_tokens, finish=FinishReason.FAILED, error=error)


class StepLoop:
    """`run` executes a plan on all ranks of the group; its second argument is a traceparent to record under.

    `on_step` hears of each plan that ran, and how many seconds the loop's whole turn took. With `on_interrupted`, which
    hears why, a step that fails as connections do interrupts the loop and does not break it.
    """

    def __init__(
        self,
        batcher: Batcher,
        run: Callable[[StepPlan, str], StepResult],
        *,
        rank: int,
        clock: Callable[[], float],
        company: Company | None = None,
        on_broken: Callable[[], None] = lambda: None,
        on_interrupted: Callable[[str], None] | None = None,
        overlap: bool = False,
        on_step: Callable[[StepPlan, float], None] | None = None,
    ) -> None:
        self._batcher = batcher
        self._run = run
        self._rank = rank
        self.clock = clock
        self._company = company
        self._on_broken = on_broken
        self._on_interrupted = on_interrupted
        self._interrupted: str | None = None
        self._resting = False
        self._num_attempts = 0  # at the step in progress
        self._on_step = on_step
        # Every step runs there, those without work too: all of a rank's kernels are one thread's, and its helpers'.
        self._beside: Beside[tuple[StepResult, float] | None] | None = Beside("steps") if overlap else None
        self._flying: tuple[StepPlan, str] | None = None  # a plan that runs beside already, and its traceparent
        self._unfinished: deque[tuple[StepPlan, str]] = deque()  # the same of plans to be run, or run again, next
        self._outlets: list[Outlet] = []
        self._inbox: list[Callable[[], None]] = []
        self._inbox_changed = threading.Condition()
        self._stopping = False
        # Guards the batcher and what follows, which are the loop thread's own but for `fail`. Never held in a step.
        self._state = threading.Condition()
        self._open: dict[str, _Open] = {}
        self._num_traced = 0
        self._step = 0
        self._load = batcher.load()
        self._broken: str | None = None
        self._draining = False
        self._probes: set[threading.Event] = set()
        self._probe_numbers = count()
        self._thread = threading.Thread(target=self._loop, name="step-loop", daemon=True)

    @property
    def reason(self) -> str | None:
        """Why the loop is broken; None while it is not."""
        return self._broken

    @property
    def interrupted(self) -> str | None:
        """Why the loop rests, or is about to; None while it goes on."""
        return self._interrupted

    @property
    def load(self) -> BatcherLoad:
        """As of the last step."""
        return self._load

    def attach(self, outlet: Outlet) -> None:
        """`outlet` hears of every step's load, and of the loop's end. Before `start`."""
        self._outlets.append(outlet)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, outlet: Outlet | None = None) -> None:
        """Queue a sequence whose key no open one has; `outlet` hears of it. From any thread."""
        self._tell(lambda: self._submit(request, outlet))

    def cancel(self, key: str) -> None:
        """End a sequence that is still open: as CANCELLED, unless it ends otherwise before. From any thread."""
        self._tell(lambda: self._cancel(key))

    def probe(self, timeout_s: float) -> float:
        """Seconds until a token came through every rank of the group: its own or, in a busy group, another's.

        Raises Broken, or TimeoutError where no step makes a token in time.
        """
        started_s = time.monotonic()
        done = threading.Event()
        key = f"probe:{next(self._probe_numbers)}"
        with self._state:
            if self._broken is not None:
                raise Broken(self._broken)
            self._probes.add(done)
        sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        self.submit(
            Request(key=key, prompt_token_ids=(0,), sampling=sampling, arrival_s=self.clock(), priority=-(2**31))
        )
        came = done.wait(timeout_s)
        with self._state:
            self._probes.discard(done)
        self.cancel(key)
        if self._broken is not None:
            raise Broken(self._broken)
        if not came:
            raise TimeoutError(f"no token came through the group in {timeout_s:g} s")
        return time.monotonic() - started_s

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait until all is answered; False where that takes longer."""
        with self._state:
            self._draining = True
            return self._state.wait_for(lambda: not self._open, timeout_s)

    def stop(self, timeout_s: float) -> None:
        """End the thread after the step in progress, or leave it in its step; what is open ends as FAILED."""
        with self._inbox_changed:
            self._stopping = True
            self._inbox_changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self.fail(STOPPED)

    def fail(self, reason: str) -> None:
        """End everything open as FAILED and break the loop, even while a step hangs. From any thread."""
        with self._state:
            if self._broken is not None:
                return
            self._broken = reason
            log.log(logging.INFO if reason == STOPPED else logging.ERROR, "step loop ends: %s", reason)
            # The batcher is not asked: a step may hang in flight, or the batcher's own mistake have brought us here.
            self._deliver([_failed(key, entry.num_output_tokens) for key, entry in self._open.items()])
            for outlet in self._outlets:
                outlet.broken()
            for probe in self._probes:
                probe.set()
        self._turn_away()
        if reason != STOPPED:
            self._on_broken()

    def interrupt(self, reason: str) -> None:
        """Begin no step until `resume`; everything open stays so. From any thread."""
        with self._inbox_changed:
            if self._interrupted is not None or self._broken is not None:
                return
            self._interrupted = reason
            self._inbox_changed.notify_all()
        log.warning("step loop is interrupted: %s", reason)
        if self._on_interrupted is not None:
            self._on_interrupted(reason)

    def rest(self, timeout_s: float) -> bool:
        """Wait until an interrupted loop's step has ended, one way or another; False where that takes longer."""
        with self._inbox_changed:
            return self._inbox_changed.wait_for(lambda: self._resting or self._broken is not None, timeout_s)

    def resume(self, generation: int) -> None:
        """Go on in a new generation; a loop at rest begins with the step that was interrupted."""
        with self._inbox_changed:
            assert self._resting or self._broken is not None, "resume before rest"
            self._batcher.generation = generation
            self._interrupted = None
            self._resting = False
            self._inbox_changed.notify_all()

    def renumber(self, generation: int) -> None:
        """The generation has changed without this group: its steps go on."""
        self._batcher.generation = generation

    def wake(self) -> None:
        """Looks again whether the company waits. From any thread."""
        with self._inbox_changed:
            self._inbox_changed.notify()

    @property
    def _has_step(self) -> bool:
        if self._flying is not None or self._unfinished or self._batcher.has_work:
            return True
        return self._company is not None and self._company.pending

    def _tell(self, action: Callable[[], None]) -> None:
        with self._inbox_changed:
            if self._broken is None:
                self._inbox.append(action)
                self._inbox_changed.notify()
                return
        with self._state:
            action()

    def _loop(self) -> None:
        while True:
            with self._inbox_changed:
                while not (self._stopping or self._broken or self._goes_on):
                    if self._interrupted is not None and not self._resting:
                        self._resting = True
                        self._inbox_changed.notify_all()
                    self._inbox_changed.wait()
                if self._stopping or self._broken:
                    break
                inbox, self._inbox = self._inbox, []
            try:
                self._once(inbox)
            except Exception as error:
                self._give_way(error)
        if self._beside is not None:
            self._beside.close()

    @property
    def _goes_on(self) -> bool:
        if self._interrupted is not None:
            return self._flying is not None  # it cannot be called back
        return bool(self._inbox) or self._has_step

    def _give_way(self, error: Exception) -> None:
        """What becomes of a step that raised: torch tells of a peer's death by RuntimeError, sockets by OSError."""
        reason = f"{type(error).__name__}: {error}"
        if self._on_interrupted is None or not isinstance(error, RuntimeError | OSError):
            log.exception("step %d failed", self._step)
            self.fail(reason)
        elif self._num_attempts >= MOST_ATTEMPTS:
            log.exception("step %d failed", self._step)
            self.fail(f"a step failed {self._num_attempts} times, the last time so: {reason}")
        else:
            self.interrupt(reason)

    def _turn_away(self) -> None:
        """Answers what came in while the loop broke, and wakes its thread."""
        with self._inbox_changed:
            inbox, self._inbox = self._inbox, []
            self._inbox_changed.notify()
        with self._state:
            for action in inbox:
                action()

    def _once(self, inbox: list[Callable[[], None]]) -> None:
        """At most one step."""
        began_s = self.clock()
        plan, traceparent = self._next(inbox)
        if plan is None:
            if self._company is not None and self._company.pending and self._broken is None:
                self._keep_step(self._company)
            return
        ahead: tuple[StepPlan, str] | None = None
        self._num_attempts += 1
        try:
            if self._beside is None:
                result, step_s = self._timed(plan, traceparent)
            else:
                if self._flying is None:
                    self._begin(self._beside, plan, traceparent)
                ahead = self._plan_ahead()
                end = self._beside.end()
                assert end is not None
                result, step_s = end
        except (RuntimeError, OSError):
            # What is planned stays so, and runs in this order if it ever runs.
            self._flying = None
            if ahead is not None:
                self._unfinished.appendleft(ahead)
            self._unfinished.appendleft((plan, traceparent))
            raise
        self._num_attempts = 0
        self._take_in(plan, result, step_s, ahead)
        if self._on_step is not None:
            self._on_step(plan, self.clock() - began_s)

    def _next(self, inbox: list[Callable[[], None]]) -> tuple[StepPlan | None, str]:
        """What the inbox asks is done; then the plan that runs already, or the next one, and its traceparent."""
        with self._state:
            for action in inbox:
                action()
            if self._flying is not None:
                return self._flying
            if self._unfinished and self._broken is None:
                return self._unfinished.popleft()
            plan = None if self._broken else self._batcher.schedule()
            if events := self._batcher.take_events():
                self._deliver(events)
            return plan, self._traceparent(plan) if plan is not None and self._num_traced else ""

    def _plan_ahead(self) -> tuple[StepPlan, str] | None:
        """What will follow the step that runs, where that can be told already."""
        with self._state:
            if self._unfinished:
                return self._unfinished.popleft()
            plan = None if self._broken or self._interrupted else self._batcher.schedule_ahead()
            if events := self._batcher.take_events():
                self._deliver(events)
            if plan is None:
                return None
            return plan, self._traceparent(plan) if self._num_traced else ""

    def _take_in(self, plan: StepPlan, result: StepResult, step_s: float, ahead: tuple[StepPlan, str] | None) -> None:
        """What a step made goes into the histories, then `ahead` may begin, then everybody hears of it."""
        with self._state:
            begins = ahead is not None and self._interrupted is None
            self._flying = ahead if begins else None
            if ahead is not None and not begins:
                self._unfinished.appendleft(ahead)
            if self._broken is not None:
                return
            self._step = plan.step
            events = self._batcher.commit(plan, result, step_s=step_s)
            if ahead is not None and begins:
                assert self._beside is not None
                self._begin(self._beside, *ahead)
            self._deliver([*events, *self._batcher.take_events()], step=True)
            if self._probes and any(made.token_id is not None for made in result.sequences):
                for probe in self._probes:
                    probe.set()

    def _begin(self, beside: Beside[tuple[StepResult, float] | None], plan: StepPlan, traceparent: str) -> None:
        beside.begin(lambda: self._timed(plan, traceparent))

    def _keep_step(self, company: Company) -> None:
        if self._beside is None:
            company.keep_step()
            return
        self._beside.begin(company.keep_step)
        self._beside.end()

    def _timed(self, plan: StepPlan, traceparent: str) -> tuple[StepResult, float]:
        """Runs a plan; its result, and the seconds it took."""
        start_ns = time.time_ns() if traceparent else 0
        began_s = self.clock()
        result = self._run(plan, traceparent)
        step_s = self.clock() - began_s
        if traceparent:
            record_step(
                traceparent,
                rank=self._rank,
                step=plan.step,
                num_tokens=plan.num_tokens,
                num_sequences=len(plan.sequences),
                start_ns=start_ns,
            )
        return result, step_s

    def _submit(self, request: Request, outlet: Outlet | None) -> None:
        num_output_tokens = len(request.output_token_ids)
        if outlet is not None and (self._broken is not None or self._draining):
            error = _FAILED if self._broken is not None else "the engine is draining"
            outlet.deliver(StepBatch(self._step, [_failed(request.key, num_output_tokens, error)], self._load))
            return
        spans = SequenceSpans(request, rank=self._rank) if request.traceparent else None
        self._num_traced += spans is not None
        self._open[request.key] = _Open(outlet, spans, request.traceparent, num_output_tokens)
        self._batcher.submit(request)

    def _cancel(self, key: str) -> None:
        if self._broken is None:
            self._batcher.cancel(key)

    def _deliver(self, events: list[Event], *, step: bool = False) -> None:
        if self._broken is None:
            load = self._batcher.load()
            imbalance = 0.0 if self._company is None else self._company.imbalance
            self._load = replace(load, ep_imbalance=imbalance) if imbalance else load
        batches: dict[int, tuple[Outlet, list[Event]]] = {}
        if step:
            batches = {id(outlet): (outlet, []) for outlet in self._outlets}
        for event in events:
            entry = self._open[event.key]
            entry.num_output_tokens += event.token_id is not None
            if entry.spans is not None:
                entry.spans.see(event)
            if entry.outlet is not None:
                batches.setdefault(id(entry.outlet), (entry.outlet, []))[1].append(event)
            if event.finish is not None:
                del self._open[event.key]
                self._num_traced -= entry.spans is not None
        for outlet, part in batches.values():
            outlet.deliver(StepBatch(self._step, part, self._load))
        if not self._open:
            self._state.notify_all()

    def _traceparent(self, plan: StepPlan) -> str:
        """Of a traced sequence whose prompt this step computes, if there is one."""
        for sequence in plan.sequences:
            if sequence.num_computed < sequence.num_prompt_tokens and (found := self._open[sequence.key].traceparent):
                return found
        return ""
