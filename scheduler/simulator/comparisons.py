"""Policies against each other, each on one trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scheduler.batcher import BatcherSettings
from scheduler.routing import POLICIES
from scheduler.simulator.outcome import jain
from scheduler.simulator.simulation import simulate
from scheduler.simulator.step_time import StepTime
from scheduler.simulator.trace import Arrival, drawn, poisson, sessions, tokens
from scheduler.tenants import FairnessSettings

__all__ = ["COMPARISONS", "Comparison", "Row", "deadlines", "gaps", "prefixes", "tenants"]

TENANTS = ("heavy", "light1", "light2", "light3", "light4")


@dataclass(frozen=True, slots=True)
class Row:
    """A policy, and what it gave, in the order of the comparison's columns."""

    policy: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def value(self, policy: str, column: str) -> float:
        (row,) = [row for row in self.rows if row.policy == policy]
        return row.values[self.columns.index(column)]


def settings(**changes: Any) -> BatcherSettings:
    values: dict[str, Any] = {
        "max_batch_size": 32,
        "max_batch_tokens": 2048,
        "max_model_len": 16_384,
        "block_size": 16,
        "num_blocks": 8192,
        "max_waiting": 100_000,
    }
    return BatcherSettings(**(values | changes))


def capacity(trace: Sequence[Arrival], limits: BatcherSettings, step_time: StepTime) -> float:
    """Requests per second that get through while there are always more; neither beginning nor end count."""
    report = simulate([replace(arrival, at_s=0.0, timeout_s=None) for arrival in trace], limits, step_time=step_time)
    ends = sorted(outcome.end_s for outcome in report.outcomes)
    first, last = len(ends) // 5, len(ends) * 4 // 5
    return (last - first) / (ends[last] - ends[first])


def tenants(step_time: StepTime, *, seed: int = 1, seconds: float = 60.0) -> Comparison:
    """A heavy tenant asks for eight times its share, four light ones for a little more than theirs."""
    rng = random.Random(seed)  # noqa: S311
    limits = settings(prefix_cache=False)
    sizes: Mapping[str, Any] = {"prompt": 256, "answer": 64}
    share = capacity(drawn(rng, [0.0] * 300, **sizes), limits, step_time) / len(TENANTS)
    trace: list[Arrival] = []
    for tenant in TENANTS:
        rate = share * (8.0 if tenant == "heavy" else 1.3)
        trace += drawn(rng, poisson(rng, rate, seconds), tenant=tenant, **sizes)
    trace.sort(key=lambda arrival: arrival.at_s)
    rows = []
    for name, fairness in (("first come", None), ("token counter", FairnessSettings())):
        report = simulate(trace, replace(limits, fairness=fairness), step_time=step_time)
        service = report.service(TENANTS, seconds / 4, seconds)
        light = [one.ttft_s for one in report.outcomes if one.arrival.tenant != "heavy" and one.ttft_s is not None]
        rows.append(
            Row(
                name,
                (
                    jain(service),
                    service[0] / sum(service),
                    sorted(light)[len(light) // 2],
                    sum(service) / (0.75 * seconds),
                ),
            )
        )
    columns = ("Jain's index", "heavy's share", "light TTFT p50 s", "service/s")
    return Comparison("one heavy and four light tenants", columns, tuple(rows))


def deadlines(step_time: StepTime, *, seed: int = 2, num_requests: int = 2000, overload: float = 1.2) -> Comparison:
    """Arrivals at 1.2 times what gets through, each with a deadline of two to ten times what it needs alone."""
    rng = random.Random(seed)  # noqa: S311
    limits = settings(prefix_cache=False)
    sizes: Mapping[str, Any] = {"prompt": 256, "answer": 96}
    rate = overload * capacity(drawn(rng, [0.0] * 300, **sizes), limits, step_time)
    trace = []
    for arrival in drawn(rng, poisson(rng, rate, num_requests / rate), **sizes):
        alone_s = len(arrival.answer_token_ids) * (step_time.fixed_s + 32 * step_time.decode_sequence_s)
        trace.append(replace(arrival, timeout_s=rng.uniform(2.0, 10.0) * alone_s + 0.5))
    rows = []
    for name, tried in (
        ("first come", limits),
        ("deadline first", replace(limits, order="deadline")),
        ("deadline first, late refused", replace(limits, order="deadline", refuse_late=True)),
    ):
        report = simulate(trace, tried, step_time=step_time)
        refused = sum(one.refused for one in report.outcomes) / len(trace)
        rows.append(
            Row(
                name,
                (
                    report.met_share,
                    refused,
                    report.answers_in_time_per_s(),
                    report.tokens_per_s(),
                    report.ttft_s(0.5),
                ),
            )
        )
    columns = ("deadlines met", "refused", "answers/s in time", "tokens/s", "TTFT p50 s")
    return Comparison(f"deadlines at {overload:g} times the load that gets through", columns, tuple(rows))


def prefixes(step_time: StepTime, *, seed: int = 3, num_sessions: int = 150, num_replicas: int = 4) -> Comparison:
    """Conversations of several turns over four DP groups whose caches hold a part of them."""
    rng = random.Random(seed)  # noqa: S311
    limits = settings(num_blocks=4096)
    starts = poisson(rng, 2.5, num_sessions / 2.5)
    trace = sessions(rng, starts, system=300, turn=120, answer=100, num_turns=6, pause_s=8.0)
    rows = []
    for name in ("round-robin", "least-tokens", "prefix-affinity"):
        policy = POLICIES[name](random.Random(seed))  # noqa: S311
        report = simulate(trace, limits, step_time=step_time, num_replicas=num_replicas, policy=policy)
        ends = [sum(one.replica == index for one in report.outcomes) for index in range(num_replicas)]
        rows.append(
            Row(
                name,
                (
                    report.hit_rate,
                    1e3 * report.ttft_s(0.5),
                    1e3 * report.ttft_s(0.99),
                    max(ends) * num_replicas / len(trace),
                ),
            )
        )
    columns = ("hit rate", "TTFT p50 ms", "TTFT p99 ms", "requests max/mean")
    return Comparison(f"conversations over {num_replicas} DP groups", columns, tuple(rows))


def gaps(step_time: StepTime, *, seed: int = 4, prompt: int = 8192, num_decodes: int = 24) -> Comparison:
    """A long prompt arrives while others decode, and a short one right behind it."""
    rng = random.Random(seed)  # noqa: S311
    warm = drawn(rng, (0.02 * index for index in range(60)), prompt=300, answer=4, spread=1.0)
    decoding = drawn(rng, [1.5] * num_decodes, prompt=64, answer=600, spread=0.01)
    at_s = 5.0
    long = Arrival(at_s=at_s, prompt_token_ids=tokens(rng, prompt), answer_token_ids=(1, 2))
    short = Arrival(at_s=at_s + 0.001, prompt_token_ids=tokens(rng, 100), answer_token_ids=(1, 2))
    trace = [*warm, *decoding, long, short]
    rows = []
    for name, target_step_s in (("plain", 0.0), ("steps of 50 ms", 0.05), ("steps of 25 ms", 0.025)):
        report = simulate(trace, settings(target_step_s=target_step_s), step_time=step_time)
        ttft_s = {one.arrival: one.ttft_s for one in report.outcomes}
        rows.append(
            Row(name, (1e3 * report.worst_gap_s(at_s), 1e3 * (ttft_s[long] or 0.0), 1e3 * (ttft_s[short] or 0.0)))
        )
    columns = ("worst gap ms", "long TTFT ms", "short TTFT ms")
    return Comparison(f"a prompt of {prompt} tokens arrives while {num_decodes} sequences decode", columns, tuple(rows))


COMPARISONS: Mapping[str, Callable[[StepTime], Comparison]] = {
    "tenants": tenants,
    "deadlines": deadlines,
    "prefixes": prefixes,
    "gaps": gaps,
}
"""By the name used on the command line."""
