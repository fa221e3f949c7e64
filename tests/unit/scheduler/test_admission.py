"""The bound on what a front door holds open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scheduler.admission import AdmissionLimits, OpenLoad, Verdict, admit

LIMITS = AdmissionLimits(max_open_requests=4, max_open_tokens=1000, least_retry_s=0.5, most_retry_s=30.0)


def test_up_to_the_limits_everything_is_admitted() -> None:
    assert admit(LIMITS, OpenLoad(num_requests=0, num_tokens=0), 1000) == Verdict(True)
    assert admit(LIMITS, OpenLoad(num_requests=3, num_tokens=900), 100) == Verdict(True)


def test_too_many_tokens_wait_for_the_excess_to_go() -> None:
    verdict = admit(LIMITS, OpenLoad(num_requests=1, num_tokens=900, tokens_per_s=50.0), 200)
    assert (verdict.admitted, verdict.retry_after_s) == (False, 2.0)
    assert verdict.reason == "too many tokens are open: 900 of 1000"


def test_background_work_is_turned_away_first() -> None:
    limits = replace(LIMITS, background_share=0.5)
    load = OpenLoad(num_requests=2, num_tokens=300)
    assert admit(limits, load, 100).admitted
    assert admit(limits, load, 100, priority=-1).admitted
    verdict = admit(limits, load, 100, priority=1)
    assert not verdict.admitted
    assert verdict.reason == "too many requests are open for this priority: 2 of 2"
    assert verdict.retry_after_s is not None
    assert admit(limits, replace(load, num_requests=1), 100, priority=1).admitted
    assert admit(limits, replace(load, num_requests=0), 600, priority=1).retry_after_s is None


def test_too_many_requests_wait_for_one_to_go() -> None:
    verdict = admit(LIMITS, OpenLoad(num_requests=4, num_tokens=400, tokens_per_s=50.0), 1)
    assert (verdict.admitted, verdict.retry_after_s) == (False, 2.0)
    assert verdict.reason == "too many requests are open: 4 of 4"


@pytest.mark.parametrize(("tokens_per_s", "retry_after_s"), [(0.0, 0.5), (1e9, 0.5), (0.1, 30.0)])
def test_the_hint_is_bounded(tokens_per_s: float, retry_after_s: float) -> None:
    load = OpenLoad(num_requests=1, num_tokens=1000, tokens_per_s=tokens_per_s)
    assert admit(LIMITS, load, 100).retry_after_s == retry_after_s


def test_what_can_never_be_admitted_gets_no_hint() -> None:
    verdict = admit(LIMITS, OpenLoad(num_requests=0, num_tokens=0), 1001)
    assert verdict == Verdict(False, "the request may need 1001 tokens; the limit is 1000")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_open_requests": 0}, "max_open_requests"),
        ({"max_open_tokens": 0}, "max_open_tokens"),
        ({"least_retry_s": 0.0}, "least_retry_s"),
        ({"most_retry_s": 0.1}, "least_retry_s"),
    ],
)
def test_limits_name_the_field_at_fault(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        AdmissionLimits(**({"max_open_requests": 4, "max_open_tokens": 1000} | changes))
