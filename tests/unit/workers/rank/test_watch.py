"""The watch over peers, with peers and collectives made up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from workers.parallel.collectives import Collectives, SharedMemoryCollectives, SingleRank
from workers.watch import Heard, PeerWatch


class Waiting(SharedMemoryCollectives):
    """An all-reduce that has been waiting for a while."""

    def __init__(self, waited_s: float) -> None:
        self.waited_s = waited_s
        self.released = threading.Event()

    def blocked_s(self) -> float:
        return self.waited_s

    def release(self) -> None:
        self.released.set()


class Wire:
    """Peers that are heard as a script says; every look takes half a second of a clock of its own."""

    def __init__(self, *script: Heard) -> None:
        self.now_s = 0.0
        self.told = 0
        self._script: Iterator[Heard] = iter(script)
        self.over = threading.Event()

    def tell(self) -> None:
        self.told += 1

    def listen(self, timeout_s: float) -> Heard:
        self.now_s += 0.5
        heard = next(self._script, None)
        if heard is None:
            self.over.set()
            self.now_s -= 0.5  # nothing happens any more
        return heard or Heard()


def watching(wire: Wire, collectives: Collectives, order: list[str], *, step_timeout_s: float = 2) -> PeerWatch:
    watch = PeerWatch(
        wire,
        collectives,
        step_timeout_s=step_timeout_s,
        on_gone=lambda reason: order.append(f"gone: {reason}"),
        on_hang=lambda reason: order.append(f"hang: {reason}"),
        clock=lambda: wire.now_s,
    )
    watch.start()
    return watch


ALIVE = Heard(alive=["rank 1"])


def test_a_peer_that_goes_is_reported_once() -> None:
    heard: list[str] = []
    watch = watching(Wire(ALIVE, Heard(gone=["rank 1", "rank 2"])), SingleRank(), heard)
    watch._thread.join(10)
    assert heard == ["gone: rank 1, rank 2 has gone"]
    watch.end()


def test_a_peer_that_falls_silent_is_reported() -> None:
    heard: list[str] = []
    wire = Wire(ALIVE, *[Heard()] * 5)
    watch = watching(wire, SingleRank(), heard)
    watch._thread.join(10)
    assert heard == ["hang: rank 1 was silent for 2 s"]
    assert wire.now_s == 3.0, "the first look that is more than two seconds behind what was heard"
    assert wire.told == 6, "once a look"


def test_who_was_never_heard_may_be_about_to_start_and_who_speaks_now_and_then_lives() -> None:
    heard: list[str] = []
    wire = Wire(*[Heard()] * 20, *[ALIVE, Heard(), Heard(), Heard()] * 5, ALIVE)
    watch = watching(wire, SingleRank(), heard)
    assert wire.over.wait(10)
    watch.end()
    assert all("silent" in reason for reason in heard), heard
    assert wire.now_s >= 20.5


def test_a_process_that_was_held_up_itself_blames_nobody() -> None:
    heard: list[str] = []

    class Frozen(Wire):
        def listen(self, timeout_s: float) -> Heard:
            self.now_s += 60.0
            return super().listen(timeout_s)

    wire = Frozen(ALIVE, *[Heard()] * 10)
    watch = watching(wire, SingleRank(), heard)
    assert wire.over.wait(10)
    watch.end()
    assert heard == []


def test_a_waiting_all_reduce_is_released_after_the_report() -> None:
    collectives = Waiting(waited_s=2.5)
    order: list[str] = []
    watch = watching(Wire(), collectives, order)
    assert collectives.released.wait(10)
    assert order == ["hang: an all-reduce waited for more than 2 s"]
    watch.end()


def test_nothing_is_reported_while_all_is_well_or_after_the_end() -> None:
    heard: list[str] = []
    wire = Wire(*[ALIVE] * 50)
    watch = watching(wire, Waiting(waited_s=0.5), heard, step_timeout_s=20)
    assert wire.over.wait(10)
    watch.end()
    assert heard == []
