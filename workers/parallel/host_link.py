"""Two ranks of one host: a socket that says what happened, and memory of both that holds the rows.

Each side owns the memory that it sends from, a file without a name: it is passed over the socket, so only the peer has
it too, and nothing is left behind however the processes end. It has two places for pieces. A piece is written into one
of them and announced by a message; a place is free again once the peer says, in any message, that it has taken the
piece out. Messages carry the generation and number their pieces: what is of another generation, or out of turn, ends
the link. A peer that dies ends it at once, because the kernel closes its socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
from array import array
from collections import deque
from typing import NamedTuple

import torch

__all__ = ["PIECE_BYTES", "Link"]

PIECE_BYTES = 1 << 19
# The largest message, for the counts that go with a first piece.
_MESSAGE_BYTES = 1 << 16
_PLACES = 2
# Where in a link's state its numbers lie; `host_exchange.cpp` knows them in this order. Of a piece that was heard of
# there: its number, its bytes, and those that follow in others.
_IN, _PUT, _FREED, _TAKEN, _HEARD = 3, 5, 6, 7, 8
_MESSAGE = struct.Struct("=QQQQQ")  # generation, piece or 0, pieces taken, its bytes, bytes that follow in others
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Piece(NamedTuple):
    """A piece that has come; `left` bytes of the same whole follow in later ones."""

    number: int
    size: int
    left: int
    head: bytes


class Link:
    """One side; owned by the step's thread, but for `hang_up`. Raises RuntimeError once the peer has gone."""

    def __init__(self, rank: int, generation: int, connection: socket.socket) -> None:
        """Sends this side's memory over `connection`; `open` must follow on both sides."""
        self.rank = rank
        self._generation = generation
        self._socket = connection
        outbox = os.memfd_create(f"shoal-to-{rank}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(outbox, 0, _PLACES * PIECE_BYTES)  # full memory is told here, not by a signal later
            fcntl.fcntl(outbox, fcntl.F_ADD_SEALS, _SEALS)
            socket.send_fds(connection, [b"outbox"], [outbox])
            self._out = _map(outbox)
        finally:
            os.close(outbox)
        self._in = self._out[:0]
        self._unread: deque[_Piece] = deque()
        self._gone = False
        outbox_at = self._out.data_ptr()
        self.state = array("q", [connection.fileno(), generation, outbox_at, 0, PIECE_BYTES, *[0] * 6])

    def open(self) -> None:
        """Waits for the peer's memory, as long as the socket's timeout. Raises OSError where none comes."""
        _, descriptors, _, _ = socket.recv_fds(self._socket, 16, 1)
        if len(descriptors) != 1:
            raise ConnectionError(f"rank {self.rank} sent no memory")
        try:
            if not fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ConnectionError(f"rank {self.rank} could take its memory back")
            self._in = _map(descriptors[0])
        finally:
            os.close(descriptors[0])
        self.state[_IN] = self._in.data_ptr()
        self._socket.settimeout(None)

    @property
    def address(self) -> int:
        """Of the state."""
        return self.state.buffer_info()[0]

    @property
    def heard(self) -> bool:
        """Whether a piece was heard of through the state."""
        return self.state[_HEARD] != 0

    @property
    def heard_bytes(self) -> int:
        return self.state[_HEARD + 1]

    def adopt(self) -> None:
        """Has `take` find the piece that was heard of through the state."""
        number, size, left = self.state[_HEARD:]
        self._unread.append(_Piece(number, size, left, b""))

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def gone(self) -> bool:
        """The peer has left, and nothing it sent is unread."""
        return self._gone and not self._unread

    @property
    def readable(self) -> bool:
        """Whether `take` has a piece."""
        return bool(self._unread)

    @property
    def has_room(self) -> bool:
        """Whether `put` may be called."""
        return self.state[_PUT] - self.state[_FREED] < _PLACES

    def put(self, data: torch.Tensor, left: int, head: bytes = b"") -> None:
        """Sends a piece, `data` uint8 [at most PIECE_BYTES]; `left` bytes follow in later ones."""
        assert self.has_room
        size = len(data)
        if size:
            start = self.state[_PUT] % _PLACES * PIECE_BYTES
            self._out[start : start + size].copy_(data)
        self.state[_PUT] += 1
        self._send(_MESSAGE.pack(self._generation, self.state[_PUT], self.state[_TAKEN], size, left) + head)

    @property
    def head(self) -> bytes:
        """What was sent with the next piece, which has come."""
        return self._unread[0].head

    def take(self, into: torch.Tensor) -> tuple[int, int]:
        """Copies the next piece, which has come, to the start of `into`; its bytes, and those still to follow.

        Raises RuntimeError where it does not fit.
        """
        piece = self._unread.popleft()
        if piece.size > len(into):
            raise RuntimeError(f"rank {self.rank} sends more than is due")
        if piece.size:
            start = (piece.number - 1) % _PLACES * PIECE_BYTES
            into[: piece.size].copy_(self._in[start : start + piece.size])
        self.state[_TAKEN] += 1
        # The last piece of a whole needs no answer: this side's next whole tells, and cannot be far.
        if piece.left:
            with contextlib.suppress(RuntimeError):  # it has sent everything and left: `read` sees that in its turn
                self._send(_MESSAGE.pack(self._generation, 0, self.state[_TAKEN], 0, 0))
        return piece.size, piece.left

    def read(self) -> None:
        """Takes in every message that has come, and whether the peer has left. Does not block."""
        while not self._gone:
            try:
                message = self._socket.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it left with something of ours unread, told once: what it sent follows
                continue
            except OSError:
                message = b""
            if not message:
                self._gone = True
                return
            generation, number, freed, size, left = _MESSAGE.unpack_from(message)
            if generation != self._generation:
                raise RuntimeError(f"rank {self.rank} is of generation {generation}, not {self._generation}")
            expected = self.state[_TAKEN] + len(self._unread) + 1
            if number not in (0, expected) or size > PIECE_BYTES or not self.state[_FREED] <= freed <= self.state[_PUT]:
                raise RuntimeError(f"rank {self.rank} is out of turn")
            self.state[_FREED] = freed
            if number:
                self._unread.append(_Piece(number, size, left, message[_MESSAGE.size :]))

    def hang_up(self) -> None:
        """Ends the link for both sides. From any thread."""
        with contextlib.suppress(OSError):  # it has gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._socket.close()

    def _send(self, message: bytes) -> None:
        try:
            self._socket.send(message)
        except OSError as error:
            raise RuntimeError(f"rank {self.rank} has gone") from error


def _map(descriptor: int) -> torch.Tensor:
    """The memory behind a descriptor, which may be closed then; it goes with the last tensor that shows it."""
    if os.fstat(descriptor).st_size < _PLACES * PIECE_BYTES:
        raise ConnectionError("shared memory is smaller than agreed")
    return torch.frombuffer(mmap.mmap(descriptor, _PLACES * PIECE_BYTES), dtype=torch.uint8)
