"""The way back of a pipeline: the last stage tells the first rank what a step has made.

A connection of its own beside the plan channel, made by the same handshake. Results come in the order of the steps.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from protos.shoal.v1 import session_pb2
from workers.parallel.channel import ChannelRefused, read_message, write_message

__all__ = ["ResultReceiver", "ResultSender"]

_LOOK_S = 0.25


class ResultSender:
    """The end of the rank that samples. Owned by its follower's thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, answer: session_pb2.StepResult) -> None:
        """Raises OSError where the first rank has gone."""
        write_message(self._connection, answer.SerializeToString())

    def close(self) -> None:
        _close(self._connection)


class ResultReceiver:
    """The first rank's end: a thread takes results in. `on_result` is called from it, and must not block.

    `on_gone` hears, once, that the other end has gone, is of another generation, or lets the step that is awaited wait
    for too long.
    """

    def __init__(self, generation: int, connection: socket.socket) -> None:
        self._generation = generation
        self._connection = connection
        self._found: deque[session_pb2.StepResult] = deque()
        self._due_s: float | None = None
        self._closed = False
        self._on_result: Callable[[], None] = lambda: None
        self._on_gone: Callable[[str], None] = lambda _: None
        self._thread = threading.Thread(target=self._listen, name="results", daemon=True)

    def start(self, on_result: Callable[[], None], on_gone: Callable[[str], None]) -> None:
        self._on_result, self._on_gone = on_result, on_gone
        self._thread.start()

    def expect(self, within_s: float | None) -> None:
        """The next result must come in so many seconds; None where none is awaited."""
        self._due_s = None if within_s is None else time.monotonic() + within_s

    @property
    def ready(self) -> bool:
        return bool(self._found)

    def take(self) -> session_pb2.StepResult:
        """The next one, which must be there."""
        return self._found.popleft()

    def close(self) -> None:
        """From any thread."""
        self._closed = True
        with contextlib.suppress(OSError):  # it has gone already
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._connection.close()

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN | select.POLLRDHUP)
        while not self._closed:
            try:
                if poll.poll(_LOOK_S * 1000):
                    self._take_in()
                    continue
                reason = self._overdue()
            except (OSError, ChannelRefused) as error:
                reason = f"the last stage has gone: {error}"
            if reason:
                if not self._closed:
                    self._on_gone(reason)
                return

    def _take_in(self) -> None:
        answer = session_pb2.StepResult.FromString(read_message(self._connection))
        if answer.generation != self._generation:
            raise ChannelRefused(f"a result of generation {answer.generation} in generation {self._generation}")
        self._found.append(answer)
        self._on_result()

    def _overdue(self) -> str:
        due_s = self._due_s
        if due_s is None or self._found or time.monotonic() < due_s:
            return ""
        return "the last stage does not bring the step to an end"


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has gone already
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
