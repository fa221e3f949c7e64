"""Notices that a peer has gone, or hangs, while this process waits for it.

A gloo or NCCL collective fails by itself when a peer dies, and at its timeout when one hangs. The shared-memory
all-reduce does neither, and an idle group runs no collective at all: this thread covers both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from workers.parallel.collectives import Collectives, SharedMemoryCollectives

__all__ = ["PeerWatch"]

_LOOK_S = 0.25


class PeerWatch:
    """`gone(timeout_s)` waits for peers to hang up and says which did; `on_gone` hears the reason, once."""

    def __init__(
        self,
        gone: Callable[[float], str | None],
        collectives: Collectives,
        *,
        step_timeout_s: float,
        on_gone: Callable[[str], None],
    ) -> None:
        self._gone = gone
        self._shared = collectives if isinstance(collectives, SharedMemoryCollectives) else None
        self._step_timeout_s = step_timeout_s
        self._on_gone = on_gone
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
            reason = self._gone(_LOOK_S) or self._hangs()
            if reason is not None:
                if not self._ended.is_set():
                    self._on_gone(reason)
                if self._shared is not None:
                    self._shared.release()
                return

    def _hangs(self) -> str | None:
        if self._shared is None or self._shared.blocked_s() < self._step_timeout_s:
            return None
        return f"an all-reduce waited for more than {self._step_timeout_s:g} s"
