"""Buckets in a clock of their own, and what a tenant hears."""

from __future__ import annotations

import pytest

from cluster.front_door.errors import RateLimited
from cluster.front_door.quotas import Allowances, Quota, Quotas
from tests.unit.cluster.front_door.support import ManualClock


def make(**quota: int) -> tuple[Allowances, ManualClock]:
    clock = ManualClock()
    return Allowances(Quotas(default=Quota(**quota)), clock), clock


def test_a_minutes_worth_at_once_and_then_one_at_a_time() -> None:
    allowances, clock = make(requests_per_minute=6)
    for _ in range(6):
        allowances.check("a")
        allowances.count("a")
    with pytest.raises(RateLimited, match="6 requests per minute") as caught:
        allowances.check("a")
    assert caught.value.retry_after_s == pytest.approx(10.0)
    clock.advance(9.9)
    with pytest.raises(RateLimited):
        allowances.check("a")
    clock.advance(0.2)
    allowances.check("a")
    allowances.count("a")
    with pytest.raises(RateLimited):
        allowances.check("a")
    clock.advance(3600)
    assert allowances.standings("a")["requests"].remaining == 6, "idle time does not pile up"


def test_tokens_are_paid_behind_and_a_debt_is_waited_out() -> None:
    allowances, clock = make(tokens_per_minute=60)
    allowances.check("a")
    allowances.spend("a", 100)
    allowances.spend("a", 20)
    with pytest.raises(RateLimited, match="tokens per minute") as caught:
        allowances.check("a")
    assert caught.value.retry_after_s == pytest.approx(61.0)
    standing = allowances.standings("a")["tokens"]
    assert (standing.limit, standing.remaining) == (60, 0)
    assert standing.reset_s == pytest.approx(120.0)
    clock.advance(61.5)
    allowances.check("a")


def test_so_many_at_once_and_no_more() -> None:
    allowances, _ = make(max_open=2)
    allowances.enter("a")
    allowances.enter("a")
    with pytest.raises(RateLimited, match="2 requests at once"):
        allowances.enter("a")
    allowances.enter("b")
    allowances.leave("a")
    allowances.enter("a")


def test_tenants_do_not_share_and_without_limits_there_are_none() -> None:
    clock = ManualClock()
    quotas = Quotas(default=Quota(), tenants={"a": Quota(requests_per_minute=1)})
    allowances = Allowances(quotas, clock)
    allowances.check("a")
    allowances.count("a")
    with pytest.raises(RateLimited):
        allowances.check("a")
    for _ in range(1000):
        allowances.check("b")
        allowances.count("b")
        allowances.spend("b", 10**6)
        allowances.enter("b")
    assert allowances.standings("b") == {}
