"""The plan channel: the first rank of a DP group tells the others what to run.

One TCP connection per follower carries length-prefixed protobuf. Both ends prove that they hold the cluster's
secret before anything else is read: each answers the other's random challenge with an HMAC-SHA256 over the
challenges, its own role, the generation and the rank, so an answer serves no other connection, and a rank of an
old generation is refused. What follows is not authenticated message by message.

The same listener and handshake connect the first ranks of an engine's DP groups (`pulse.py`), and the rank of a
pipeline that samples with the first one, for the way back (`results.py`).

After the handshake a follower sends nothing but single bytes, and the first rank empty messages between plans: each
says that its process runs. `listen` hears them, and that the other process has gone, beside whoever reads plans.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import secrets
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Container, Mapping

from protos.shoal.v1 import session_pb2
from workers.watch import Heard

__all__ = [
    "ChannelRefused",
    "PlanListener",
    "PlanReceiver",
    "PlanSender",
    "connect",
    "read_message",
    "write_message",
]

_MAGIC = b"shoal-plan-1"
_HELLO = struct.Struct(f"!{len(_MAGIC)}sQI32s")  # magic, generation, rank, the follower's challenge
_ANSWER = struct.Struct("!32s32s")  # the first rank's challenge, its proof
_LENGTH = struct.Struct("!I")
_PROOF_SIZE = 32
_MAX_MESSAGE_BYTES = 64 << 20
_HANDSHAKE_TIMEOUT_S = 10.0
_ACCEPTED = b"\x01"
_FIRST = "the first rank"
_ALIVE = b"\x00"
_EMPTY = _LENGTH.pack(0)
_UNREAD = struct.Struct("=i")  # of FIONREAD


class ChannelRefused(RuntimeError):
    """The other end does not hold the secret, or is of another generation."""


def _proof(secret: bytes, role: bytes, generation: int, rank: int, mine: bytes, theirs: bytes) -> bytes:
    message = role + struct.pack("!QI", generation, rank) + mine + theirs
    return hmac.digest(secret, message, "sha256")


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view, len(view), socket.MSG_WAITALL)
        if not count:
            raise ConnectionError("the other end of the plan channel has gone")
        view = view[count:]
    return bytes(data)


def write_message(connection: socket.socket, payload: bytes) -> None:
    """Raises OSError where the other end has gone."""
    if len(payload) > _MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(payload)} bytes exceeds the channel's {_MAX_MESSAGE_BYTES}")
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


def read_message(connection: socket.socket) -> bytes:
    """Blocks for what `write_message` wrote next. Raises ConnectionError at the end."""
    (size,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if size > _MAX_MESSAGE_BYTES:
        raise ChannelRefused(f"a message of {size} bytes exceeds the channel's {_MAX_MESSAGE_BYTES}")
    return _read(connection, size)


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed, or its peer has gone already
        connection.shutdown(socket.SHUT_RDWR)


def _send_if_room(connection: socket.socket, data: bytes) -> None:
    """Few bytes, whole or not at all. That the other end has gone shows where it is listened to."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLOUT)
    with contextlib.suppress(OSError):
        if poll.poll(0):
            connection.sendall(data)


class PlanListener:
    """The first rank's listening socket; it outlives generations."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    def accept(self, ranks: set[int], *, generation: int, secret: bytes, timeout_s: float) -> dict[int, socket.socket]:
        """Waits for exactly these ranks; strangers are refused meanwhile. Raises TimeoutError naming who is missing."""
        deadline_s = time.monotonic() + timeout_s
        found: dict[int, socket.socket] = {}
        while missing := ranks - found.keys():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                for connection in found.values():
                    connection.close()
                raise TimeoutError(f"ranks {sorted(missing)} did not open the plan channel in {timeout_s:g} s")
            self._socket.settimeout(left_s)
            with contextlib.suppress(TimeoutError):
                connection, _ = self._socket.accept()
                rank = _admit(connection, missing, generation, secret)
                if rank is not None:
                    found[rank] = connection
        return found

    def turn_away(self) -> None:
        """Whoever waits for an answer, while nobody is expected: the queue is not endless."""
        self._socket.settimeout(0)
        with contextlib.suppress(OSError):  # nobody does, or the end has come
            while True:
                self._socket.accept()[0].close()

    def close(self) -> None:
        self._socket.close()


def _admit(connection: socket.socket, ranks: set[int], generation: int, secret: bytes) -> int | None:
    """The first rank's half of the handshake; None, and the connection closed, for whoever fails it."""
    connection.settimeout(_HANDSHAKE_TIMEOUT_S)
    try:
        magic, their_generation, rank, theirs = _HELLO.unpack(_read(connection, _HELLO.size))
        if magic == _MAGIC and their_generation == generation and rank in ranks:
            mine = secrets.token_bytes(32)
            connection.sendall(_ANSWER.pack(mine, _proof(secret, b"first", generation, rank, mine, theirs)))
            expected = _proof(secret, b"follower", generation, rank, theirs, mine)
            if hmac.compare_digest(_read(connection, _PROOF_SIZE), expected):
                connection.sendall(_ACCEPTED)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return int(rank)
    except OSError:
        pass  # a stranger that hangs up, stalls or sends too little is refused like one with a wrong proof
    connection.close()
    return None


def connect(host: str, port: int, *, rank: int, generation: int, secret: bytes, timeout_s: float) -> socket.socket:
    """The connection of `rank` to a listener. Raises ChannelRefused, or OSError where nobody answers."""
    connection = socket.create_connection((host, port), timeout=timeout_s)
    try:
        mine = secrets.token_bytes(32)
        connection.sendall(_HELLO.pack(_MAGIC, generation, rank, mine))
        theirs, proof = _ANSWER.unpack(_read(connection, _ANSWER.size))
        if not hmac.compare_digest(proof, _proof(secret, b"first", generation, rank, theirs, mine)):
            raise ChannelRefused("the first rank does not hold the cluster's secret")
        connection.sendall(_proof(secret, b"follower", generation, rank, mine, theirs))
        _read(connection, len(_ACCEPTED))
    except ConnectionError as error:
        connection.close()
        raise ChannelRefused(f"the first rank refused rank {rank} of generation {generation}") from error
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class PlanSender:
    """The first rank's end. Owned by the step loop."""

    def __init__(self, generation: int, connections: Mapping[int, socket.socket]) -> None:
        self.generation = generation
        self._connections = dict(connections)
        self._sending = threading.Lock()  # a message must not begin within another

    def send(self, plan: session_pb2.StepPlan, ranks: Container[int] | None = None) -> None:
        """To all, or to those of `ranks` that follow. Raises OSError where one has gone."""
        wanted = [connection for rank, connection in self._connections.items() if ranks is None or rank in ranks]
        payload = plan.SerializeToString() if wanted else b""
        with self._sending:
            for connection in wanted:
                write_message(connection, payload)

    def tell(self) -> None:
        """Says that this process runs. From any thread; a plan that is being sent says it as well."""
        if self._sending.acquire(blocking=False):
            try:
                for connection in self._connections.values():
                    _send_if_room(connection, _EMPTY)
            finally:
                self._sending.release()

    def listen(self, timeout_s: float) -> Heard:
        """Of the followers, as soon as there is something to hear; from one thread."""
        poll = select.poll()
        ranks = {connection.fileno(): rank for rank, connection in self._connections.items()}
        for descriptor in ranks:
            poll.register(descriptor, select.POLLIN | select.POLLRDHUP)
        gone: list[str] = []
        alive: list[str] = []
        for rank in sorted(ranks[descriptor] for descriptor, _ in poll.poll(timeout_s * 1000)):
            try:
                said = self._connections[rank].recv(4096, socket.MSG_DONTWAIT)
            except OSError:
                said = b""
            (alive if said else gone).append(f"rank {rank}")
        return Heard(gone, alive)

    def hang_up(self) -> None:
        """Ends the channel for both ends and for whoever waits here. From any thread."""
        for connection in self._connections.values():
            _shut_down(connection)

    def close(self) -> None:
        self.hang_up()
        for connection in self._connections.values():
            connection.close()


class PlanReceiver:
    """A follower's end. Owned by the follower's loop."""

    def __init__(self, generation: int, connection: socket.socket) -> None:
        self.generation = generation
        self._connection = connection
        self._num_taken = self._num_came = 0  # bytes that were read, and bytes that had come when last looked at

    def receive(self) -> session_pb2.StepPlan:
        """Blocks for the next plan. Raises ConnectionError at the end, ChannelRefused for another generation's plan."""
        payload = b""
        while not payload:
            payload = read_message(self._connection)
            self._num_taken += _LENGTH.size + len(payload)
        plan = session_pb2.StepPlan.FromString(payload)
        if plan.generation != self.generation:
            raise ChannelRefused(f"a plan of generation {plan.generation} in generation {self.generation}")
        return plan

    def tell(self) -> None:
        """Says that this process runs. From one thread."""
        _send_if_room(self._connection, _ALIVE)

    def listen(self, timeout_s: float) -> Heard:
        """Of the first rank: that it has gone, as soon as it has, even with plans unread, or after `timeout_s` whether
        anything came meanwhile, read or not. From one thread."""
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLRDHUP)
        if poll.poll(timeout_s * 1000):
            return Heard(gone=[_FIRST])
        unread = fcntl.ioctl(self._connection.fileno(), termios.FIONREAD, bytes(_UNREAD.size))
        num_came = self._num_taken + int(_UNREAD.unpack(unread)[0])
        heard = num_came != self._num_came
        self._num_came = num_came
        return Heard(alive=[_FIRST] if heard else [])

    def hang_up(self) -> None:
        """Ends the channel for both ends and for whoever waits here. From any thread."""
        _shut_down(self._connection)

    def close(self) -> None:
        self.hang_up()
        self._connection.close()
