"""Plays a trace on replicas of a DP group, each with its own real batcher, behind one router."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.batcher import Batcher, BatcherSettings
from scheduler.groups import GroupView, RouteRequest, RoutingPolicy
from scheduler.plan import Event, FinishReason, SequenceResult, StepPlan, StepResult
from scheduler.request import Request, SamplingParams
from scheduler.routing import RoundRobin, route_prefix
from scheduler.settings import BatcherLoad
from scheduler.simulator.outcome import Outcome, Report
from scheduler.simulator.step_time import StepTime
from scheduler.simulator.trace import EOS, Arrival

__all__ = ["simulate"]

_EXPECTED_TOKENS = 128  # that a front door counts for an answer of unknown length
_NOTHING = SequenceResult()


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class _Open:
    """A request under way, and what it still weighs for the router."""

    arrival: Arrival
    prompt_weight: int
    answer_weight: int
    token_times_s: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def weight(self) -> int:
        return self.prompt_weight + self.answer_weight


class _Replica:
    """A DP group: its batcher, the step in flight, and what the router knows of it."""

    def __init__(self, index: int, settings: BatcherSettings, step_time: StepTime, clock: _Clock) -> None:
        self.index = index
        self.batcher = Batcher(settings, clock=clock)
        self.open: dict[str, _Open] = {}
        self.outcomes: list[Outcome] = []
        self.num_steps = 0
        self._settings = settings
        self._step_time = step_time
        self._clock = clock
        self._flight: tuple[StepPlan, float] | None = None
        self._reported: BatcherLoad = self.batcher.load()
        self._outstanding_tokens = 0

    @property
    def busy(self) -> bool:
        return self._flight is not None

    def view(self) -> GroupView:
        load = self._reported
        return GroupView(
            key=str(self.index),
            engine="simulated",
            healthy=True,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_waiting_tokens=load.num_waiting_tokens,
            num_free_blocks=load.num_free_blocks,
            num_blocks=load.num_blocks,
            outstanding_tokens=self._outstanding_tokens,
            num_outstanding=len(self.open),
            max_batch_tokens=self._settings.max_batch_tokens,
        )

    def submit(self, key: str, arrival: Arrival) -> None:
        max_tokens = max(arrival.max_tokens, len(arrival.answer_token_ids))
        opened = _Open(arrival, len(arrival.prompt_token_ids), min(_EXPECTED_TOKENS, max_tokens))
        self.open[key] = opened
        self._outstanding_tokens += opened.weight
        now_s = self._clock()
        self.batcher.submit(
            Request(
                key=key,
                prompt_token_ids=arrival.prompt_token_ids,
                sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=max_tokens == len(arrival.answer_token_ids)),
                arrival_s=now_s,
                eos_token_ids=frozenset({EOS}),
                deadline_s=None if arrival.timeout_s is None else arrival.at_s + arrival.timeout_s,
                priority=arrival.priority,
                tenant=arrival.tenant,
            )
        )
        self._see(self.batcher.take_events())

    def start(self) -> float | None:
        """Begin a step; when it will be over, or None where there is nothing to do."""
        plan = self.batcher.schedule()
        self._see(self.batcher.take_events())
        if plan is None:
            return None
        step_s = self._step_time.seconds(plan)
        self._flight = (plan, step_s)
        self.num_steps += 1
        return self._clock() + step_s

    def finish(self) -> None:
        """The step is over."""
        assert self._flight is not None
        plan, step_s = self._flight
        self._flight = None
        self._see(self.batcher.commit(plan, self._run(plan), step_s=step_s))
        self._reported = self.batcher.load()

    def _run(self, plan: StepPlan) -> StepResult:
        results = []
        for one in plan.sequences:
            if not one.samples:
                results.append(_NOTHING)
                continue
            opened = self.open.get(one.key)
            answer = opened.arrival.answer_token_ids if opened is not None else ()
            results.append(SequenceResult(answer[one.position] if one.position < len(answer) else EOS))
        return StepResult(tuple(results))

    def _see(self, events: list[Event]) -> None:
        now_s = self._clock()
        for event in events:
            opened = self.open[event.key]
            if event.token_id is not None:
                if not opened.token_times_s:
                    opened.num_cached_tokens = event.num_cached_tokens
                    self._outstanding_tokens -= opened.prompt_weight
                    opened.prompt_weight = 0
                opened.token_times_s.append(now_s)
                if opened.answer_weight > 1:
                    opened.answer_weight -= 1
                    self._outstanding_tokens -= 1
            if event.finish is not None:
                self._end(event.key, event.finish)

    def _end(self, key: str, finish: FinishReason) -> None:
        opened = self.open.pop(key)
        self._outstanding_tokens -= opened.weight
        self.outcomes.append(
            Outcome(
                arrival=opened.arrival,
                finish=finish,
                end_s=self._clock(),
                token_times_s=tuple(opened.token_times_s),
                num_cached_tokens=opened.num_cached_tokens,
                replica=self.index,
            )
        )


def simulate(
    trace: Sequence[Arrival],
    settings: BatcherSettings,
    *,
    step_time: StepTime | None = None,
    num_replicas: int = 1,
    policy: RoutingPolicy | None = None,
) -> Report:
    """Play a trace, which is in the order of its times, to its end. A router that refuses is our mistake."""
    clock = _Clock()
    policy = RoundRobin() if policy is None else policy
    step_time = StepTime() if step_time is None else step_time
    replicas = [_Replica(index, settings, step_time, clock) for index in range(num_replicas)]
    ends: list[tuple[float, int]] = []

    def start(replica: _Replica) -> None:
        end_s = replica.start()
        if end_s is not None:
            heapq.heappush(ends, (end_s, replica.index))

    index = 0
    while index < len(trace) or ends:
        if ends and (index == len(trace) or ends[0][0] <= trace[index].at_s):
            clock.now_s, number = heapq.heappop(ends)
            replicas[number].finish()
            start(replicas[number])
            continue
        arrival = trace[index]
        clock.now_s = arrival.at_s
        request = RouteRequest(
            num_tokens=len(arrival.prompt_token_ids),
            max_tokens=max(arrival.max_tokens, len(arrival.answer_token_ids)),
            prefix=route_prefix(arrival.prompt_token_ids, arrival.tenant),
            now_s=clock.now_s,
        )
        chosen = policy.choose([replica.view() for replica in replicas], request)
        assert chosen is not None
        replicas[chosen].submit(str(index), arrival)
        if not replicas[chosen].busy:
            start(replicas[chosen])
        index += 1
    loads = [replica.batcher.load() for replica in replicas]
    outcomes = [outcome for replica in replicas for outcome in replica.outcomes]
    return Report(
        outcomes=tuple(sorted(outcomes, key=lambda outcome: outcome.arrival.at_s)),
        end_s=clock.now_s,
        num_steps=sum(replica.num_steps for replica in replicas),
        num_preemptions=sum(load.num_preemptions for load in loads),
        prefix_hit_tokens=sum(load.prefix_hit_tokens for load in loads),
        prefix_query_tokens=sum(load.prefix_query_tokens for load in loads),
    )
