"""Tenants share a DP group by what it costs to serve them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from scheduler.fairness import FairQueue
from scheduler.plan import FinishReason
from scheduler.sequence import Sequence
from scheduler.tenants import FairnessSettings, TenantLimits
from tests.unit.scheduler.harness import Bench, request, settings


def bench_of(fairness: FairnessSettings | None = None, **changes: Any) -> Bench:
    fair = FairnessSettings() if fairness is None else fairness
    return Bench(settings(**({"fairness": fair, "prefix_cache": False, "max_waiting": 1000} | changes)))


def queue_of(bench: Bench) -> FairQueue:
    queue = bench.batcher._waiting
    assert isinstance(queue, FairQueue)
    return queue


def served_tokens(bench: Bench) -> Counter[str]:
    """Output tokens by tenant."""
    return Counter(
        bench.requests[key].tenant for key, events in bench.events.items() for e in events if e.token_id is not None
    )


def backlog(bench: Bench, tenant: str, num_requests: int, prompt: int = 8, max_tokens: int = 4, **changes: Any) -> None:
    first = len(bench.requests)
    bench.submit(
        *(
            request(f"{tenant}{first + index}", prompt, max_tokens=max_tokens, tenant=tenant, **changes)
            for index in range(num_requests)
        )
    )


def test_a_late_tenant_does_not_wait_for_another_s_backlog() -> None:
    bench = bench_of(max_batch_size=2)
    backlog(bench, "heavy", 50)
    bench.step()
    backlog(bench, "light", 2)
    for _ in range(12):
        bench.step()
    assert all(bench.finish(key) for key in bench.requests if key.startswith("light"))
    bench.drain()
    bench.check_end()


def test_equal_tenants_get_equal_service_whatever_their_requests_look_like() -> None:
    bench = bench_of(max_batch_size=4)
    backlog(bench, "long", 100, prompt=40, max_tokens=4)
    backlog(bench, "short", 400, prompt=2, max_tokens=4)
    for _ in range(150):
        bench.step()
    queue = queue_of(bench)
    services = [queue.service_of(tenant) for tenant in ("long", "short")]
    assert max(services) - min(services) <= 2 * (40 + 2 * 4 * 4)
    assert min(services) > 500


def test_weights() -> None:
    bench = bench_of(FairnessSettings(tenants={"b": TenantLimits(weight=3.0)}), max_batch_size=2)
    backlog(bench, "a", 200)
    backlog(bench, "b", 200)
    for _ in range(200):
        bench.step()
    served = served_tokens(bench)
    assert served["b"] / served["a"] == pytest.approx(3.0, rel=0.1)


def test_credit_from_idle_times_does_not_pile_up() -> None:
    bench = bench_of(max_batch_size=2)
    backlog(bench, "sleeper", 1)
    bench.drain()
    backlog(bench, "busy", 100)
    for _ in range(100):
        bench.step()
    before = served_tokens(bench)
    backlog(bench, "sleeper", 100)
    for _ in range(100):
        bench.step()
    gained = served_tokens(bench) - before
    assert gained["sleeper"] / gained["busy"] == pytest.approx(1.0, rel=0.15)


def test_a_return_to_an_empty_queue_is_lifted_too() -> None:
    bench = bench_of(max_batch_size=2)
    backlog(bench, "busy", 20)
    bench.drain()
    backlog(bench, "sleeper", 30)
    backlog(bench, "busy", 30)
    for _ in range(40):
        bench.step()
    served = served_tokens(bench)
    assert served["busy"] - 80 >= served["sleeper"] / 2


def test_cached_tokens_cost_nothing() -> None:
    bench = bench_of(prefix_cache=True)
    backlog(bench, "a", 1, prompt=33, max_tokens=1)
    bench.drain()
    service = queue_of(bench).service_of("a")
    backlog(bench, "a", 1, prompt=33, max_tokens=1)
    bench.drain()
    assert (service, queue_of(bench).service_of("a")) == (35.0, 38.0)


def test_classes_come_before_tenants_and_deadlines_rule_within_one() -> None:
    bench = bench_of(max_batch_size=1, order="deadline")
    bench.submit(request("a1", tenant="a", max_tokens=1, deadline_s=190.0))
    bench.submit(request("a2", tenant="a", max_tokens=1, deadline_s=180.0))
    bench.submit(request("b1", tenant="b", max_tokens=1), request("b2", tenant="b", max_tokens=1, priority=-1))
    assert [bench.step().sequences[0].key for _ in range(4)] == ["b2", "a2", "a1", "b1"]


def test_limits_on_requests() -> None:
    bench = bench_of(FairnessSettings(tenants={"a": TenantLimits(max_requests=2)}), max_batch_size=1)
    backlog(bench, "a", 1)
    bench.step()
    backlog(bench, "a", 2)
    backlog(bench, "b", 3)
    assert [bench.finish(key) for key in bench.requests].count(FinishReason.REFUSED) == 1
    assert bench.events["a2"][0].error == "the tenant has 2 requests open, the most it may have"
    bench.drain()
    backlog(bench, "a", 1)
    bench.drain()
    assert bench.finish("a6") is FinishReason.LENGTH


def test_limits_on_queued_tokens() -> None:
    bench = bench_of(FairnessSettings(default=TenantLimits(max_queued_tokens=20)), max_batch_size=1)
    backlog(bench, "a", 3)
    backlog(bench, "b", 1, prompt=30)
    refused = [key for key in bench.requests if bench.finish(key) is FinishReason.REFUSED]
    assert refused == ["a2"]
    assert bench.events["a2"][0].error == "the tenant has 16 tokens queued; it may have 20"


def test_limits_on_blocks() -> None:
    bench = bench_of(FairnessSettings(tenants={"a": TenantLimits(max_blocks=6)}))
    backlog(bench, "a", 4)  # of 11 tokens in 3 blocks each
    backlog(bench, "b", 3)
    backlog(bench, "a", 1, prompt=30)
    assert bench.events["a7"][0].error == "the request may need 9 KV blocks; its tenant may hold 6"
    assert Counter(one.key[0] for one in bench.step().sequences) == {"a": 2, "b": 3}
    bench.drain()
    bench.check_end()


def test_what_is_ahead_of_a_light_tenant_is_not_another_s_whole_backlog() -> None:
    bench = bench_of(max_batch_size=1)
    backlog(bench, "heavy", 40, prompt=10)
    backlog(bench, "light", 2)
    queue = queue_of(bench)
    last = bench.batcher._open["light41"]
    assert queue.ahead_of(last) == (1 + 2, 8 + 20)


def test_accounts_of_tenants_that_are_gone_are_forgotten() -> None:
    bench = bench_of()
    for index in range(3000):
        bench.submit(request(str(index), 1, max_tokens=1, tenant=f"t{index}"))
        bench.step()
    assert len(queue_of(bench)._accounts) <= 1100


@given_settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from([1.0, 2.0]))
def test_service_of_tenants_with_work_stays_close(seed: int, num_tenants: int, weight: float) -> None:
    """Theorem 4.8 of the paper: the difference is bounded by what may be in the batch, however long it goes on."""
    rng = random.Random(seed)
    fairness = FairnessSettings(tenants={"t0": TenantLimits(weight=weight)})
    bench = bench_of(fairness, max_batch_size=4, num_blocks=400)
    for tenant in range(num_tenants):
        size = rng.randint(1, 24)
        for _ in range(30):
            backlog(bench, f"t{tenant}", 1, prompt=rng.randint(1, size), max_tokens=rng.randint(1, size))
    queue = queue_of(bench)
    names = [f"t{tenant}" for tenant in range(num_tenants)]
    start = {name: queue.service_of(name) for name in names}
    while all(any(one.request.tenant == name for one in queue) for name in names):
        bench.step()
        gained = [queue.service_of(name) - start[name] for name in names]
        assert max(gained) - min(gained) <= 2 * max(24, 2 * 4 * 24)


@pytest.mark.parametrize(("name", "value"), [("weight", 0.0), ("max_requests", -1), ("max_blocks", -1)])
def test_limits_name_the_field_at_fault(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        TenantLimits(**{name: value})  # type: ignore[arg-type]


def test_a_tenant_whose_service_grew_gives_way_at_once() -> None:
    queue = FairQueue(FairnessSettings(), block_size=4)
    sequences = [
        Sequence.open(request(key, 4, tenant=key[0], max_tokens=4), order=(index,), max_output_tokens=4)
        for index, key in enumerate(["a1", "a2", "b1", "c1"])
    ]
    for sequence in sequences:
        queue.push(sequence)
    assert queue.peek() is sequences[0]
    queue.remove(sequences[0])
    queue.admitted(sequences[0], 4)
    assert queue.peek() is sequences[2]
    queue.remove(sequences[2])
    queue.admitted(sequences[2], 5)
    queue.served([sequences[2]])
    assert queue.peek() is sequences[3]
    queue.remove(sequences[3])
    assert queue.peek() is sequences[1]
    queue.remove(sequences[1])
    assert queue.peek() is None
    assert (len(queue), queue.num_tokens) == (0, 0)
