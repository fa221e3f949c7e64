"""Notices that a peer has gone, is frozen or hangs, while this process waits for it.

A gloo or NCCL collective fails by itself when a peer dies, and at its timeout when one hangs. The shared-memory
all-reduce does neither, and an idle group runs no collective at all: this thread covers both. Several times within the
step timeout each rank of a group says that its process runs, whatever its step does; only silence counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.parallel.collectives import Collectives, SharedMemoryCollectives

__all__ = ["Heard", "Line", "PeerWatch"]

_LOOK_S = 0.25
_LOOKS_PER_TIMEOUT = 5


@dataclass(frozen=True, slots=True)
class Heard:
    """Of the peers, as one calls them: who has gone, and whose process showed that it runs."""

    gone: Sequence[str] = ()
    alive: Sequence[str] = ()


class Line(Protocol):
    """A rank's connections to the others that it watches."""

    def tell(self) -> None:
        """Says that this process runs; never waits."""
        ...

    def listen(self, timeout_s: float) -> Heard:
        """Comes back when there is something to hear, or after `timeout_s`."""
        ...


class PeerWatch:
    """`on_gone` hears of a peer that has gone, `on_hang` of one that is silent or keeps an all-reduce waiting for
    `step_timeout_s`: one of them, once, with the reason."""

    def __init__(
        self,
        line: Line,
        collectives: Collectives,
        *,
        step_timeout_s: float,
        on_gone: Callable[[str], None],
        on_hang: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._line = line
        self._shared = collectives if isinstance(collectives, SharedMemoryCollectives) else None
        self._step_timeout_s = step_timeout_s
        self._look_s = min(_LOOK_S, step_timeout_s / _LOOKS_PER_TIMEOUT)
        self._on_gone = on_gone
        self._on_hang = on_hang
        self._clock = clock
        self._heard_s: dict[str, float] = {}
        self._looked_s = self._told_s = float("-inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            if self._clock() - self._told_s >= self._look_s:
                self._told_s = self._clock()
                self._line.tell()
            heard = self._line.listen(self._look_s)
            gone = f"{', '.join(heard.gone)} has gone" if heard.gone else None
            hangs = self._silent(heard.alive) or self._hangs()
            if gone or hangs:
                if not self._ended.is_set():
                    if gone:
                        self._on_gone(gone)
                    elif hangs:
                        self._on_hang(hangs)
                if self._shared is not None:
                    self._shared.release()
                return

    def _silent(self, alive: Sequence[str]) -> str | None:
        """One that has never been heard may still be about to start."""
        now_s = self._clock()
        if now_s - self._looked_s > self._step_timeout_s / 2:
            # This process itself was held up: what it has not heard says nothing about the others.
            self._heard_s = dict.fromkeys(self._heard_s, now_s)
        self._looked_s = now_s
        self._heard_s |= dict.fromkeys(alive, now_s)
        for peer, heard_s in self._heard_s.items():
            if now_s - heard_s > self._step_timeout_s:
                return f"{peer} was silent for {self._step_timeout_s:g} s"
        return None

    def _hangs(self) -> str | None:
        if self._shared is None or self._shared.blocked_s() < self._step_timeout_s:
            return None
        return f"an all-reduce waited for more than {self._step_timeout_s:g} s"
