"""What the batcher's tests share: a clock, a runner whose cache remembers, and the outputs that must come of it."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from scheduler.batcher import Batcher, BatcherSettings
from scheduler.plan import (
    Event,
    FinishReason,
    ScheduledSequence,
    SequenceResult,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from scheduler.request import Request, SamplingParams

VOCAB_SIZE = 23
NO_END = (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.FAILED)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def settings(**changes: Any) -> BatcherSettings:
    values: dict[str, Any] = {
        "max_batch_size": 8,
        "max_batch_tokens": 64,
        "max_model_len": 64,
        "block_size": 4,
        "num_blocks": 64,
        "max_waiting": 32,
    }
    return BatcherSettings(**(values | changes))


def request(key: str, prompt: Sequence[int] | int = 5, *, arrival_s: float = 100.0, **changes: Any) -> Request:
    """A request of `prompt` tokens, or of that many; unknown names are sampling parameters."""
    prompt_token_ids = tuple(prompt) if not isinstance(prompt, int) else tuple(i % VOCAB_SIZE for i in range(prompt))
    own = {name: changes.pop(name) for name in list(changes) if name in Request.__dataclass_fields__}
    return Request(
        key=key,
        prompt_token_ids=prompt_token_ids,
        sampling=SamplingParams(**changes),
        arrival_s=arrival_s,
        **own,
    )


def next_token(history: Iterable[int], forbidden: frozenset[int] = frozenset()) -> int:
    """The fake model: a hash of everything before, stepped past what is forbidden."""
    token_id = zlib.crc32(array("q", history).tobytes()) % VOCAB_SIZE
    while token_id in forbidden:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


class Runner:
    """Writes tokens to their slots and reads the whole sequence back through its block table.

    Where a block is in two tables, was freed too early, or a token was not computed, the read differs from the history.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[int, int], int] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for scheduled in plan.sequences:
            for place in range(scheduled.num_computed, scheduled.num_computed + scheduled.num_tokens):
                self._slots[self._slot(scheduled, place)] = scheduled.history[place]
        return StepResult(tuple(self._result(scheduled) for scheduled in plan.sequences))

    def _slot(self, scheduled: ScheduledSequence, place: int) -> tuple[int, int]:
        index, offset = divmod(place, self._block_size)
        return scheduled.block_ids[index], offset

    def _result(self, scheduled: ScheduledSequence) -> SequenceResult:
        end = scheduled.num_computed + scheduled.num_tokens
        cached = [self._slots[self._slot(scheduled, place)] for place in range(end)]
        assert cached == list(scheduled.history[:end])
        assert scheduled.samples == (end == len(scheduled.history))
        assert scheduled.num_logits >= scheduled.samples
        prompt_logprobs = tuple(
            TokenLogprobs(scheduled.history[row + 1], -float(row + 1), 1)
            for row in range(end - scheduled.num_logits, min(end, scheduled.num_prompt_tokens - 1))
        )
        token_id = next_token(cached, scheduled.forbidden_token_ids) if scheduled.samples else None
        return SequenceResult(token_id=token_id, prompt_logprobs=prompt_logprobs)


def expected_output(wanted: Request, limits: BatcherSettings) -> tuple[list[int], FinishReason]:
    """What the request gives with the engine for itself and without any limit but the lengths."""
    sampling = wanted.sampling
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(wanted.eos_token_ids))
    output = list(wanted.output_token_ids)
    while True:
        if output and output[-1] in ends and len(output) > sampling.min_tokens:
            return output, FinishReason.STOP
        length = len(wanted.prompt_token_ids) + len(output)
        if output and (len(output) >= sampling.max_tokens or length >= limits.max_sequence_len):
            return output, FinishReason.LENGTH
        forbidden = frozenset(ends) if len(output) < sampling.min_tokens else frozenset()
        output.append(next_token([*wanted.prompt_token_ids, *output], forbidden))


class Bench:
    """A batcher with its runner and its clock, checked after every act; keeps all events by key."""

    def __init__(self, limits: BatcherSettings, **options: Any) -> None:
        self.clock = Clock()
        self.limits = limits
        self.batcher = Batcher(limits, clock=self.clock, generation=3, **options)
        self.runner = Runner(limits.block_size)
        self.requests: dict[str, Request] = {}
        self.events: dict[str, list[Event]] = {}
        self.plans: list[StepPlan] = []  # in flight

    @property
    def plan(self) -> StepPlan | None:
        return self.plans[0] if self.plans else None

    def submit(self, *requests: Request) -> None:
        for one in requests:
            self.requests[one.key] = one
            self.events[one.key] = []
            self.batcher.submit(one)
        self._settle([])

    def cancel(self, key: str) -> bool:
        found = self.batcher.cancel(key)
        self._settle([])
        return found

    def schedule(self) -> StepPlan | None:
        return self._take(self.batcher.schedule())

    def schedule_ahead(self) -> StepPlan | None:
        return self._take(self.batcher.schedule_ahead())

    def schedule_beside(self) -> StepPlan | None:
        return self._take(self.batcher.schedule_beside())

    def commit(self, step_s: float | None = None) -> list[Event]:
        """Run the first plan in flight, and commit it."""
        plan = self.plans.pop(0)
        events = self.batcher.commit(plan, self.runner.run(plan), step_s=step_s)
        self._settle(events)
        return events

    def fail(self, error: str) -> None:
        self.batcher.fail(error)
        self.plans.clear()
        self._settle([])

    def step(self) -> StepPlan:
        plan = self.schedule()
        assert plan is not None
        self.commit()
        return plan

    def drain(self, max_steps: int = 10_000) -> int:
        """Run to the end; the number of steps it took."""
        for num_steps in range(max_steps):
            while self.plans:
                self.commit()
            if not self.batcher.has_work:
                return num_steps
            if self.schedule() is not None:
                self.commit()
        raise AssertionError(f"still busy after {max_steps} steps")

    def drain_overlapped(self, max_steps: int = 10_000) -> tuple[int, int]:
        """Run to the end, plans made while the one before them runs where that can be; how many were, and were not."""
        num_ahead = num_plain = 0
        while self.batcher.has_work or self.plans:
            assert num_ahead + num_plain < max_steps, f"still busy after {max_steps} steps"
            if not self.plans:
                if self.schedule() is None:
                    continue
                num_plain += 1
            if len(self.plans) == 1:
                num_ahead += self.schedule_ahead() is not None
            self.commit()
        return num_ahead, num_plain

    def drain_pipelined(self, max_steps: int = 10_000) -> list[int]:
        """Run to the end with as many steps in flight as there can be; how many there were at each commit."""
        in_flight: list[int] = []
        while self.batcher.has_work or self.plans:
            assert len(in_flight) < max_steps, f"still busy after {max_steps} steps"
            while len(self.plans) < self.batcher.num_flights and self.schedule_beside() is not None:
                pass
            if self.plans:
                in_flight.append(len(self.plans))
                self.commit()
        return in_flight

    def output(self, key: str) -> list[int]:
        """The tokens that came, after those that were replayed."""
        emitted = [event.token_id for event in self.events[key] if event.token_id is not None]
        return [*self.requests[key].output_token_ids, *emitted]

    def finish(self, key: str) -> FinishReason | None:
        ends = [event.finish for event in self.events[key] if event.finish is not None]
        return ends[0] if ends else None

    def check_end(self) -> None:
        """Everything ended as it must, and nothing is left behind."""
        for key, wanted in self.requests.items():
            assert self.events[key][-1].finish is not None, key
            finish = self.finish(key)
            if finish is FinishReason.REFUSED:
                assert self.output(key) == list(wanted.output_token_ids)
                continue
            output, end = expected_output(wanted, self.limits)
            if finish in NO_END:
                assert self.output(key) == output[: len(self.output(key))]
            else:
                assert (self.output(key), finish) == (output, end)
        load = self.batcher.load()
        assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (0, 0, 0)
        assert load.num_free_blocks == load.num_blocks

    def _take(self, plan: StepPlan | None) -> StepPlan | None:
        self._settle([])
        if plan is not None:
            self._check_limits(plan)
            self.plans.append(plan)
        return plan

    def _settle(self, events: list[Event]) -> None:
        self.batcher.check_integrity()
        for event in [*self.batcher.take_events(), *events]:
            known = self.events[event.key]
            assert all(earlier.finish is None for earlier in known), f"{event} after the end"
            assert event.position == len(self.output(event.key))
            assert event.token_id is not None or event.finish is not None
            known.append(event)

    def _check_limits(self, plan: StepPlan) -> None:
        assert 1 <= len(plan.sequences) <= self.limits.max_batch_size
        assert 1 <= plan.num_tokens <= self.limits.max_batch_tokens
        sizes = [scheduled.num_tokens for scheduled in plan.sequences]
        assert sizes == [size for size in sizes if size == 1] + [size for size in sizes if size != 1]
        assert len({scheduled.key for scheduled in plan.sequences}) == len(sizes)
