"""The doctor's measurement between two machines, here between two addresses of one."""

from __future__ import annotations

import pytest

from cluster.doctor.link_process import LinkProblem, LinkProcess
from workers.parallel.link_probe import ProbeOrder

FIRST, SECOND = "127.0.0.1", "127.0.0.1"


def order(*, first: bool, port: int = 0, timeout_s: float = 60.0) -> ProbeOrder:
    host = FIRST if first else SECOND
    return ProbeOrder(first=first, host=host, first_host=FIRST, port=port, device="cpu", timeout_s=timeout_s)


def test_two_ends_agree() -> None:
    first = LinkProcess(order(first=True))
    try:
        second = LinkProcess(order(first=False, port=first.port()))
        try:
            ends = [end.figures() for end in (first, second)]
        finally:
            second.close()
    finally:
        first.close()
    assert [end.kind for end in ends] == ["gloo", "gloo"]
    assert all(0 < end.latency_s < 1 for end in ends)
    assert all(end.bytes_per_s > 1e6 for end in ends)


def test_an_end_that_stays_alone_gives_up_in_time() -> None:
    alone = LinkProcess(order(first=True, timeout_s=8.0))
    try:
        alone.port()
        with pytest.raises(LinkProblem):
            alone.figures()
    finally:
        alone.close()
