"""How ranks of one host come to share memory for their exchange, or find out together that they cannot.

Each listens on a socket without a path, which lives in the host's network namespace, and connects to the ranks before
it: that works within one host only, whatever addresses say. The kernel tells either side the other's user. After every
step all ranks tell in the store whether they could do it, so that they take the same way.
"""

from __future__ import annotations

import os
import platform
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from workers.parallel.host_exchange import HostExchange
from workers.parallel.host_link import Link

__all__ = ["Board", "meet"]

_BACKLOG = 128  # ranks connect before they are waited for
_HELLO = struct.Struct("=QQ")  # generation, rank
_CREDENTIALS = struct.Struct("=iII")  # Linux's struct ucred: process, user, group


class Board(Protocol):
    """The generation's part of the store; `get` waits for a value."""

    def set(self, key: str, value: str) -> object: ...

    def get(self, key: str) -> bytes: ...


def meet(
    board: Board, rank: int, members: Sequence[int], *, generation: int, join_timeout_s: float, step_timeout_s: float
) -> HostExchange | str:
    """The exchange of `members`, all of which must call this; or, at all of them, what keeps one from it."""
    meeting = _Meeting(board, rank, members, generation, join_timeout_s)
    try:
        names = meeting.all_do("listen", meeting.listen)
        meeting.all_do("connect", lambda: meeting.connect(dict(zip(members, names, strict=True))))
        meeting.all_do("share", meeting.share)
        links = {members.index(other): link for other, link in meeting.links.items()}
        return HostExchange(members.index(rank), links, step_timeout_s)
    except _Obstacle as obstacle:
        meeting.give_up()
        return str(obstacle)
    except BaseException:
        meeting.give_up()
        raise
    finally:
        if meeting.listener is not None:
            meeting.listener.close()


class _Obstacle(Exception):
    """Shared memory is not possible; the same at every rank."""


class _Meeting:
    def __init__(self, board: Board, rank: int, members: Sequence[int], generation: int, timeout_s: float) -> None:
        self._board = board
        self._rank = rank
        self._members = members
        self._generation = generation
        self._timeout_s = timeout_s
        self._connections: dict[int, socket.socket] = {}
        self.listener: socket.socket | None = None
        self.links: dict[int, Link] = {}

    def all_do(self, step: str, act: Callable[[], str]) -> list[str]:
        """What `act` gave at every member. Raises _Obstacle at all of them where it raised OSError at one."""
        try:
            told = f"+{act()}"
        except OSError as error:
            # A broken connection may only be what follows from another rank's trouble.
            mark = "?" if isinstance(error, ConnectionError) else "-"
            told = f"{mark}rank {self._rank} cannot {step}: {error.strerror or error}"
            self.give_up()  # nobody need wait for it
        self._board.set(f"host-exchange/{step}/{self._rank}", told)
        answers = [self._board.get(f"host-exchange/{step}/{member}").decode() for member in self._members]
        for mark in "-?":
            for answer in answers:
                if answer.startswith(mark):
                    raise _Obstacle(answer[1:])
        return [answer[1:] for answer in answers]

    def listen(self) -> str:
        if platform.system() != "Linux":
            raise OSError("shared memory needs Linux")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.settimeout(self._timeout_s)
        name = f"shoal-{secrets.token_hex(16)}"
        self.listener.bind(f"\0{name}")
        self.listener.listen(_BACKLOG)
        return name

    def connect(self, names: dict[int, str]) -> str:
        """To the members before this one."""
        for other in (member for member in self._members if member < self._rank):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._connections[other] = connection
            connection.settimeout(self._timeout_s)
            connection.connect(f"\0{names[other]}")
            if _user(connection) != os.geteuid():
                raise PermissionError(f"another user's process answers for rank {other}")
            connection.send(_HELLO.pack(self._generation, self._rank))
        return ""

    def share(self) -> str:
        """Memory with every other member; those behind this one have connected."""
        while missing := {member for member in self._members if member > self._rank} - self._connections.keys():
            self._admit(missing)
        for other, connection in self._connections.items():
            self.links[other] = Link(other, self._generation, connection)
        for link in self.links.values():
            link.open()
        return ""

    def give_up(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _admit(self, missing: set[int]) -> None:
        """One of the missing, or a stranger, who is turned away. Raises TimeoutError where nobody comes."""
        assert self.listener is not None
        connection, _ = self.listener.accept()
        connection.settimeout(self._timeout_s)
        hello = connection.recv(_HELLO.size) if _user(connection) == os.geteuid() else b""
        generation, rank = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (0, 0)
        if generation == self._generation and rank in missing:
            self._connections[rank] = connection
        else:
            connection.close()


def _user(connection: socket.socket) -> int:
    """Who runs the other side, by the kernel's word."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return int(user)
