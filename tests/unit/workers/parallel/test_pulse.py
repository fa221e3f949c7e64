"""The beat of DP groups, over socket pairs."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from workers.parallel.pulse import Pulse


class Group:
    """One group: how often it was woken, and why it failed."""

    def __init__(
        self,
        peers: dict[int, socket.socket],
        generation: int = 3,
        timeout_s: float = 5.0,
        stuck_s: float | None = None,
    ) -> None:
        self.woken = threading.Event()
        self.gone: list[str] = []
        self.has_gone = threading.Event()
        self.pulse = Pulse(
            generation, peers, timeout_s=timeout_s, stuck_s=stuck_s, on_wake=self.woken.set, on_gone=self._gone
        )
        self.pulse.start()

    def _gone(self, reason: str) -> None:
        self.gone.append(reason)
        self.has_gone.set()


def _sockets(size: int) -> list[dict[int, socket.socket]]:
    ends: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for a in range(size):
        for b in range(a + 1, size):
            ends[a][b], ends[b][a] = socket.socketpair()
    return ends


@contextlib.contextmanager
def _mesh(size: int, timeout_s: float = 5.0) -> Iterator[list[Group]]:
    groups = [Group(peers, timeout_s=timeout_s) for peers in _sockets(size)]
    try:
        yield groups
    finally:
        for group in groups:
            group.pulse.close()


def _in_threads(groups: list[Group], work: object) -> list[BaseException]:
    errors: list[BaseException] = []

    def call(index: int) -> None:
        try:
            work(index)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.mark.parametrize("size", [2, 4])
def test_all_groups_agree_on_every_beat(size: int) -> None:
    draw = random.Random(1)
    plans = [[draw.choice([0, 0, 5]) for _ in range(200)] for _ in range(size)]
    ran: list[list[bool]] = [[] for _ in range(size)]
    with _mesh(size) as groups:

        def work(index: int) -> None:
            for tokens in plans[index]:
                ran[index].append(groups[index].pulse.beat(tokens))

        assert not _in_threads(groups, work)
        assert not any(group.gone for group in groups)
    expected = [any(tokens) for tokens in zip(*plans, strict=True)]
    assert all(one == expected for one in ran)
    assert True in expected
    assert False in expected


def test_a_beat_wakes_the_sleepers_and_then_all_sleep_again() -> None:
    with _mesh(3) as groups:
        sleepers = groups[1:]
        assert not any(group.pulse.pending for group in groups)

        def work(index: int) -> None:
            pulse = groups[index].pulse
            if index:
                assert groups[index].woken.wait(5)
                assert pulse.pending
            assert pulse.beat(0 if index else 7)
            assert pulse.pending
            assert pulse.beat(0) is False
            assert not pulse.pending

        assert not _in_threads(groups, work)
        assert sleepers[0].pulse.tokens == {0: 0, 2: 0}


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_announced_stands_in_the_next_beat(size: int) -> None:
    draw = random.Random(size)
    plans = [[(draw.choice([0, 0, 5]), draw.choice([None, None, 3])) for _ in range(200)] for _ in range(size)]
    ran: list[list[bool]] = [[] for _ in range(size)]
    with _mesh(size) as groups:

        def work(index: int) -> None:
            pulse = groups[index].pulse
            for tokens, announced in plans[index]:
                if announced is not None:
                    pulse.announce(announced)
                    assert pulse.pending
                ran[index].append(pulse.beat(tokens))

        assert not _in_threads(groups, work)
        assert not any(group.gone for group in groups)
        brought = [tokens if announced is None else announced for tokens, announced in (plan[-1] for plan in plans)]
        assert groups[0].pulse.tokens == dict(enumerate(brought[1:], start=1))
    told = [[tokens if announced is None else announced for tokens, announced in plan] for plan in plans]
    expected = [any(tokens) for tokens in zip(*told, strict=True)]
    assert all(one == expected for one in ran)
    assert False in expected


def test_an_announcement_is_heard_before_the_beat() -> None:
    with _mesh(2) as groups:
        groups[0].pulse.announce(4)
        assert groups[1].woken.wait(5)
        assert groups[1].pulse.beat(0), "nobody has to wait for the other's beat"
        assert groups[1].pulse.tokens == {0: 4}
        assert groups[0].pulse.beat(0), "it keeps its word"


def test_an_epoch_is_agreed_on_by_what_was_announced() -> None:
    agreed: list[list[int]] = [[], []]
    with _mesh(2) as groups:
        groups[0].pulse.announce(1)  # before it can switch
        for group in groups:
            group.pulse.offer(9)

        def work(index: int) -> None:
            for _ in range(3):
                groups[index].pulse.beat(1)
                agreed[index].append(groups[index].pulse.agreed)

        assert not _in_threads(groups, work)
    assert agreed == [[0, 9, 0]] * 2


def test_the_balance_of_the_steps_is_measured() -> None:
    brought = [(30, 10), (0, 0), (20, 20), (0, 16)]
    with _mesh(2) as groups:
        assert groups[0].pulse.imbalance == 0.0, "no step yet"

        def work(index: int) -> None:
            for tokens in brought:
                groups[index].pulse.beat(tokens[index])

        assert not _in_threads(groups, work)
        assert groups[0].pulse.imbalance == groups[1].pulse.imbalance
        assert groups[0].pulse.imbalance == pytest.approx((30 + 20 + 16) / (20 + 20 + 8), rel=0.02)


def test_a_dead_peer_ends_a_beat_and_is_heard_of_while_asleep() -> None:
    ends = _sockets(2)
    survivor = Group(ends[0])
    ends[1][0].close()
    assert survivor.has_gone.wait(5)
    assert survivor.gone == ["rank 1 has gone"]
    with pytest.raises(RuntimeError, match="rank 1 has gone"):
        survivor.pulse.beat(1)
    survivor.pulse.close()


def test_a_silent_peer_ends_a_beat_at_the_timeout_and_is_heard_of_while_asleep() -> None:
    ends = _sockets(2)
    survivor = Group(ends[0], timeout_s=0.1)
    with pytest.raises(RuntimeError, match=r"rank 1 was silent for 0\.1 s"):
        survivor.pulse.beat(1)
    assert survivor.gone == ["rank 1 was silent for 0.1 s"]
    survivor.pulse.close()
    ends[1][0].close()


def test_a_peer_whose_step_takes_long_is_waited_for() -> None:
    with _mesh(2, timeout_s=0.5) as groups:

        def work(index: int) -> None:
            if index:
                time.sleep(1.5)  # a step, three times as long as a silence may be
            assert groups[index].pulse.beat(1)

        assert not _in_threads(groups, work)
        assert not any(group.gone for group in groups)


def test_a_peer_that_runs_and_never_ends_its_step_is_given_up_in_the_end() -> None:
    ends = _sockets(2)
    waiting, stuck = Group(ends[0], stuck_s=0.1), Group(ends[1])
    with pytest.raises(RuntimeError, match=r"ranks \[1\] missed a beat for 0\.1 s"):
        waiting.pulse.beat(1)
    for group in (waiting, stuck):
        group.pulse.close()


def test_an_old_generation_is_refused() -> None:
    ends = _sockets(2)
    old, new = Group(ends[0], generation=2, timeout_s=0.2), Group(ends[1], generation=3)
    with pytest.raises(RuntimeError):
        old.pulse.beat(1)
    assert new.has_gone.wait(5)
    assert "generation 2" in new.gone[0]
    old.pulse.close()
    new.pulse.close()
