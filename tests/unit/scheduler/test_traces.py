"""Random traces of arrivals, cancels, deadlines, replays and preemptions, checked after every act."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from scheduler.plan import FinishReason
from scheduler.policy import ORDERS
from scheduler.request import Request
from scheduler.tenants import FairnessSettings, TenantLimits
from tests.unit.scheduler.harness import VOCAB_SIZE, Bench, expected_output, request
from tests.unit.scheduler.harness import settings as limits

TOKENS = st.integers(0, VOCAB_SIZE - 1)
BOUNDED = TenantLimits(weight=2.0, max_requests=3, max_queued_tokens=30, max_blocks=4)
BEGINNINGS: tuple[list[int], ...] = ([], [7] * 9, list(range(14)), list(range(8)))


@st.composite
def requests(draw: st.DrawFn, key: str, now_s: float) -> Request:
    beginning = draw(st.sampled_from(BEGINNINGS))
    prompt = [*beginning, *draw(st.lists(TOKENS, min_size=1, max_size=20 - len(beginning)))]
    max_tokens = draw(st.integers(1, 12))
    return request(
        key,
        prompt,
        arrival_s=now_s,
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        eos_token_ids=draw(st.frozensets(TOKENS, max_size=2)),
        stop_token_ids=draw(st.frozensets(TOKENS, max_size=2)),
        ignore_eos=draw(st.booleans()),
        prompt_logprobs=draw(st.sampled_from([None, 0])),
        priority=draw(st.integers(-1, 1)),
        deadline_s=draw(st.sampled_from([None, None, now_s + 2.0, now_s + 9.0])),
        tenant=draw(st.sampled_from(["", "t"])),
    )


class Trace(RuleBasedStateMachine):
    """The engine loop with acts in between, also between schedule and commit."""

    @initialize(
        overlapped=st.booleans(),
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 5),
        max_batch_size=st.integers(1, 6),
        max_batch_tokens=st.integers(1, 24),
        max_waiting=st.integers(1, 8),
        max_prompt_logits=st.integers(1, 24),
        max_model_len=st.integers(4, 32),
        prefix_cache=st.booleans(),
        prefix_wait_tokens=st.integers(1, 12),
        share_prefixes=st.booleans(),
        target_step_s=st.sampled_from([0.0, 0.5, 2.0]),
        min_chunk_tokens=st.integers(1, 8),
        max_prefills=st.integers(1, 4),
        order=st.sampled_from(sorted(ORDERS)),
        max_waiting_tokens=st.sampled_from([0, 30]),
        max_queue_s=st.sampled_from([0.0, 4.0]),
        refuse_late=st.booleans(),
        preempt_lower=st.booleans(),
        fairness=st.sampled_from([None, FairnessSettings(), FairnessSettings(tenants={"t": BOUNDED})]),
    )
    def start(self, overlapped: bool, **changes: Any) -> None:
        self.overlapped = overlapped
        self.bench = Bench(limits(**changes))
        self.preempted = False

    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        key = f"r{len(self.bench.requests)}"
        self.bench.submit(data.draw(requests(key, self.bench.clock.now_s)))

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        key = f"r{len(self.bench.requests)}"
        fresh = data.draw(requests(key, self.bench.clock.now_s))
        if len(fresh.prompt_token_ids) >= self.bench.limits.max_sequence_len:
            return
        output, _ = expected_output(fresh, self.bench.limits)
        emitted = tuple(output[: data.draw(st.integers(0, len(output)))])
        self.bench.submit(
            Request(
                key=key,
                prompt_token_ids=fresh.prompt_token_ids,
                sampling=fresh.sampling,
                arrival_s=fresh.arrival_s,
                eos_token_ids=fresh.eos_token_ids,
                output_token_ids=emitted,
                deadline_s=fresh.deadline_s,
                priority=fresh.priority,
                tenant=fresh.tenant,
            )
        )

    @precondition(lambda self: self.bench.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.bench.requests)))
        was_open = self.bench.finish(key) is None
        assert self.bench.cancel(key) is was_open

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.bench.clock.now_s += seconds

    @precondition(lambda self: self.bench.plan is None)
    @rule()
    def schedule(self) -> None:
        had_work = self.bench.batcher.has_work
        plan = self.bench.schedule()
        assert had_work or plan is None
        assert (plan is not None) == self.bench.batcher.has_work

    @precondition(lambda self: len(self.bench.plans) == 1)
    @rule()
    def schedule_ahead(self) -> None:
        self.bench.schedule_ahead()

    @precondition(lambda self: self.bench.plan is not None)
    @rule(step_s=st.sampled_from([None, 0.0, 0.1, 3.0]))
    def commit(self, step_s: float | None) -> None:
        self.bench.commit(step_s)

    @precondition(lambda self: self.bench.plan is None)
    @rule(num_steps=st.integers(1, 6))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.bench.schedule() is not None:
                self.bench.commit()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.drain_overlapped() if self.overlapped else self.bench.drain()
        self.bench.check_end()
        check_prompt_logprobs(self.bench)


def check_prompt_logprobs(bench: Bench) -> None:
    """Each request's came with its first token, all of them, and never again."""
    for key, wanted in bench.requests.items():
        come = [[-entry.logprob for entry in event.prompt_logprobs] for event in bench.events[key]]
        due = wanted.sampling.prompt_logprobs is not None and not wanted.output_token_ids
        first = list(range(1, len(wanted.prompt_token_ids))) if due and bench.output(key) else []
        assert come == [first, *([[]] * (len(come) - 1))]


Trace.TestCase.settings = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
TestTrace = Trace.TestCase


def random_request(rng: random.Random, key: str, now_s: float) -> Request:
    max_tokens = rng.randint(1, 24)
    return request(
        key,
        [*rng.choice(BEGINNINGS), *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 26)))],
        arrival_s=now_s,
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, max_tokens),
        eos_token_ids=frozenset({rng.randrange(VOCAB_SIZE)}),
        priority=rng.randint(0, 2),
        deadline_s=now_s + rng.uniform(1.0, 60.0) if rng.random() < 0.1 else None,
        prompt_logprobs=rng.choice([None, None, 0]),
        tenant=rng.choice("ab"),
    )


@pytest.mark.parametrize("seed", range(6))
def test_a_long_trace_under_pressure(seed: int) -> None:
    """Many requests through a pool that holds a few of them: thousands of steps, many of which preempt.

    Every other trace makes its plans ahead.
    """
    rng = random.Random(seed)
    bench = Bench(
        limits(
            num_blocks=18,
            max_batch_size=6,
            max_batch_tokens=20,
            max_waiting=12,
            max_prompt_logits=8,
            prefix_cache=seed % 3 > 0,
            prefix_wait_tokens=6,
        )
    )
    for number in range(1500):
        bench.clock.now_s += 1.0
        if rng.random() < 0.3:
            bench.submit(random_request(rng, f"r{number}", bench.clock.now_s))
        if not bench.plans and bench.schedule() is None:
            continue
        if seed % 2:
            bench.schedule_ahead()
        unfinished = [key for key in bench.requests if bench.finish(key) is None]
        if unfinished and rng.random() < 0.03:
            bench.cancel(rng.choice(unfinished))
        bench.commit()
    bench.drain_overlapped()
    bench.check_end()
    check_prompt_logprobs(bench)
    ends = {bench.finish(key) for key in bench.requests}
    assert {FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE, FinishReason.CANCELLED} <= ends
    load = bench.batcher.load()
    assert load.num_preemptions > 30
    assert (load.prefix_hit_tokens > 300) == bench.limits.prefix_cache
