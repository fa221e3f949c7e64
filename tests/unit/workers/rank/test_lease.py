"""A rank lives as long as somebody renews its lease."""

from __future__ import annotations

import threading

from workers.lease import Lease


def test_it_lapses_once_when_nobody_renews() -> None:
    lapses: list[int] = []
    lapsed = threading.Event()

    def lapse() -> None:
        lapses.append(1)
        lapsed.set()

    lease = Lease(lapse)
    lease.renew(0.01)
    assert lapsed.wait(10)
    lease.renew(0.01)
    assert lapses == [1]


def test_renewals_put_the_end_off() -> None:
    now_s = 100.0
    lapsed = threading.Event()
    lease = Lease(lapsed.set, clock=lambda: now_s)
    lease.renew(5)
    now_s = 104.0
    lease.renew(5)
    now_s = 108.0
    lease.renew(10)
    assert not lapsed.is_set()
    now_s = 200.0
    lease.renew(-1)
    assert lapsed.wait(10)


def test_an_ended_lease_never_lapses() -> None:
    lapsed = threading.Event()
    lease = Lease(lapsed.set)
    lease.renew(0.05)
    lease.end()
    assert lease._thread is not None
    lease._thread.join(10)
    assert not lapsed.is_set()
