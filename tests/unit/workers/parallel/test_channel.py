"""The plan channel between two sockets of this process."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from protos.shoal.v1 import session_pb2
from workers.parallel import channel
from workers.parallel.channel import ChannelRefused, PlanListener, PlanReceiver, PlanSender
from workers.parallel.reach import out_of_reach
from workers.report import RankAddress
from workers.watch import Heard

SECRET = b"secret"
HOST = "127.0.0.1"


@pytest.fixture
def listener() -> Iterator[PlanListener]:
    listener = PlanListener(HOST)
    yield listener
    listener.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def receive_from(
    port: int, *, rank: int = 1, generation: int = 1, secret: bytes = SECRET, timeout_s: float = 5
) -> PlanReceiver:
    connection = channel.connect(HOST, port, rank=rank, generation=generation, secret=secret, timeout_s=timeout_s)
    return PlanReceiver(generation, connection)


def connect(
    listener: PlanListener, *, rank: int = 1, generation: int = 1, secret: bytes = SECRET, timeout_s: float = 5
) -> PlanReceiver:
    return receive_from(listener.port, rank=rank, generation=generation, secret=secret, timeout_s=timeout_s)


def accept(
    pool: ThreadPoolExecutor, listener: PlanListener, ranks: set[int], *, timeout_s: float = 5
) -> Future[PlanSender]:
    def accepted() -> PlanSender:
        return PlanSender(1, listener.accept(ranks, generation=1, secret=SECRET, timeout_s=timeout_s))

    return pool.submit(accepted)


def plan(step: int, generation: int = 1) -> session_pb2.StepPlan:
    return session_pb2.StepPlan(generation=generation, step=step, token_ids=range(step))


def test_plans_arrive_whole_and_in_order(pool: ThreadPoolExecutor, listener: PlanListener) -> None:
    accepting = accept(pool, listener, {1, 2})
    receivers = [connect(listener, rank=rank) for rank in (2, 1)]
    sender = accepting.result()
    # More than a socket buffer holds: the receiver must read while the sender writes.
    sizes = [0, 1, 300_000, 5]

    def send() -> None:
        for size in sizes:
            sender.send(plan(size))

    def receive(receiver: PlanReceiver) -> list[session_pb2.StepPlan]:
        return [receiver.receive() for _ in sizes]

    sending = pool.submit(send)
    reading = [pool.submit(receive, receiver) for receiver in receivers]
    for future in reading:
        assert future.result(10) == [plan(size) for size in sizes]
    sending.result()
    sender.close()
    for receiver in receivers:
        with pytest.raises(ConnectionError):
            receiver.receive()
        receiver.close()


@pytest.mark.parametrize(
    "stranger",
    [{"secret": b"guess"}, {"generation": 0}, {"generation": 2}, {"rank": 3}],
    ids=["wrong secret", "old generation", "future generation", "unexpected rank"],
)
def test_strangers_are_refused_and_the_rest_is_served(
    pool: ThreadPoolExecutor, listener: PlanListener, stranger: dict[str, object]
) -> None:
    accepting = accept(pool, listener, {1})
    with pytest.raises(ChannelRefused):
        connect(listener, **stranger)  # type: ignore[arg-type]
    receiver = connect(listener)
    sender = accepting.result()
    sender.send(plan(7))
    assert receiver.receive() == plan(7)
    receiver.close()
    sender.close()


def test_a_recorded_proof_does_not_serve_twice(pool: ThreadPoolExecutor, listener: PlanListener) -> None:
    """Whoever replays a follower's bytes meets a new challenge."""
    heard: list[bytes] = []
    accepting = accept(pool, listener, {1})
    with _tap(listener.port, heard) as port:
        receiver = receive_from(port)
        sender = accepting.result()
    again = accept(pool, listener, {1}, timeout_s=0.3)
    with socket.create_connection((HOST, listener.port), timeout=5) as connection:
        connection.sendall(b"".join(heard))
        assert len(connection.recv(64, socket.MSG_WAITALL)) == 64
        assert connection.recv(1) == b""
    with pytest.raises(TimeoutError, match=r"\[1\]"):
        again.result()
    receiver.close()
    sender.close()


def test_a_false_first_rank_is_refused(pool: ThreadPoolExecutor) -> None:
    with socket.create_server((HOST, 0)) as server:

        def pretend() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(bytes(64))
                connection.recv(1024)

        pretending = pool.submit(pretend)
        port = server.getsockname()[1]
        with pytest.raises(ChannelRefused, match="secret"):
            receive_from(port)
        pretending.result()


def test_who_is_missing_is_named(listener: PlanListener) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 4\]"):
        listener.accept({1, 4}, generation=1, secret=SECRET, timeout_s=0.05)


def test_whoever_is_not_expected_does_not_fill_the_queue(listener: PlanListener) -> None:
    address = RankAddress(3, HOST, listener.port, 1)
    for _ in range(3):
        for _ in range(100):  # of about 128
            assert out_of_reach([address], 5.0) == []
        listener.turn_away()


def test_a_rank_without_a_way_to_it_is_out_of_reach(listener: PlanListener) -> None:
    with socket.create_server((HOST, 0)) as server:
        closed = server.getsockname()[1]
    addresses = [RankAddress(1, HOST, closed, 1), RankAddress(2, HOST, listener.port, 1), RankAddress(3, HOST, 0, 1)]
    assert out_of_reach(addresses, 5.0) == [1], "a follower listens nowhere"


@pytest.fixture
def pair(pool: ThreadPoolExecutor, listener: PlanListener) -> Iterator[tuple[PlanSender, PlanReceiver]]:
    accepting = accept(pool, listener, {1})
    receiver = connect(listener)
    sender = accepting.result()
    yield sender, receiver
    sender.close()
    receiver.close()


def test_a_plan_of_another_generation_is_refused(pair: tuple[PlanSender, PlanReceiver]) -> None:
    sender, receiver = pair
    sender.send(plan(1, generation=0))
    with pytest.raises(ChannelRefused, match="generation 0"):
        receiver.receive()


def test_a_plan_of_absurd_size_is_refused(pair: tuple[PlanSender, PlanReceiver]) -> None:
    sender, receiver = pair
    sender._connections[1].sendall(struct.pack("!I", 1 << 31))
    with pytest.raises(ChannelRefused, match="exceeds"):
        receiver.receive()


@pytest.mark.parametrize("end", [PlanReceiver.close, PlanReceiver.hang_up], ids=["close", "hang up"])
def test_the_first_rank_notices_a_follower_that_goes(
    pair: tuple[PlanSender, PlanReceiver], end: Callable[[PlanReceiver], None]
) -> None:
    sender, receiver = pair
    assert sender.listen(0) == Heard([], [])
    timer = threading.Timer(0.05, end, [receiver])
    timer.start()
    assert sender.listen(10) == Heard(gone=["rank 1"], alive=[])
    timer.join()


def test_a_follower_notices_a_first_rank_that_goes_though_plans_are_unread(
    pair: tuple[PlanSender, PlanReceiver],
) -> None:
    sender, receiver = pair
    sender.send(plan(3))
    assert not receiver.listen(0).gone
    sender.hang_up()
    assert receiver.listen(10).gone
    assert receiver.receive() == plan(3)


def test_each_end_hears_that_the_other_runs(pair: tuple[PlanSender, PlanReceiver]) -> None:
    sender, receiver = pair
    receiver.tell()
    assert sender.listen(10) == Heard([], ["rank 1"])
    assert sender.listen(0) == Heard([], [])
    for act in (sender.tell, sender.tell, lambda: sender.send(plan(4))):
        act()
        assert any(receiver.listen(0.01).alive for _ in range(1000)), "unread, but it came"
    assert not receiver.listen(0).alive, "nothing since"
    assert receiver.receive() == plan(4), "what only says that a process runs is no plan"


def test_who_reads_nothing_keeps_nobody_waiting(pair: tuple[PlanSender, PlanReceiver]) -> None:
    sender, receiver = pair
    sender._connections[1].setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while sender._connections[1].send(bytes(1 << 16)):
            pass
    sender._connections[1].setblocking(True)
    sender.tell()
    del receiver


class _tap:
    """Forwards one connection and keeps what the client sent."""

    def __init__(self, port: int, heard: list[bytes]) -> None:
        self._port = port
        self._heard = heard
        self._server = socket.create_server((HOST, 0))

    def __enter__(self) -> int:
        self._thread = threading.Thread(target=self._forward)
        self._thread.start()
        port: int = self._server.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._server.close()

    def _forward(self) -> None:
        client, _ = self._server.accept()
        with client, socket.create_connection((HOST, self._port)) as upstream:
            for size_up, size_down in ((56, 64), (32, 1)):
                self._heard.append(client.recv(size_up, socket.MSG_WAITALL))
                upstream.sendall(self._heard[-1])
                client.sendall(upstream.recv(size_down, socket.MSG_WAITALL))
