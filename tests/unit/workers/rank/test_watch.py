"""The watch over peers, with peers and collectives made up."""

from __future__ import annotations

import threading

from workers.parallel.collectives import SharedMemoryCollectives, SingleRank
from workers.watch import PeerWatch


class Waiting(SharedMemoryCollectives):
    """An all-reduce that has been waiting for a while."""

    def __init__(self, waited_s: float) -> None:
        self.waited_s = waited_s
        self.released = threading.Event()

    def blocked_s(self) -> float:
        return self.waited_s

    def release(self) -> None:
        self.released.set()


def test_a_peer_that_goes_is_reported_once() -> None:
    heard: list[str] = []
    watch = PeerWatch(lambda _: "rank 1 has gone", SingleRank(), step_timeout_s=1, on_gone=heard.append)
    watch.start()
    watch._thread.join(10)
    assert heard == ["rank 1 has gone"]
    watch.end()


def test_a_waiting_all_reduce_is_released_after_the_report() -> None:
    collectives = Waiting(waited_s=1.5)
    order: list[bool] = []
    watch = PeerWatch(
        lambda _: None, collectives, step_timeout_s=1, on_gone=lambda _: order.append(collectives.released.is_set())
    )
    watch.start()
    assert collectives.released.wait(10)
    assert order == [False]
    watch.end()


def test_nothing_is_reported_while_all_is_well_or_after_the_end() -> None:
    looked = threading.Event()
    heard: list[str] = []

    def gone(_: float) -> None:
        looked.set()

    watch = PeerWatch(gone, Waiting(waited_s=0.5), step_timeout_s=1, on_gone=heard.append)
    watch.start()
    assert looked.wait(10)
    watch.end()
    assert heard == []
