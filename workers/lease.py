"""What keeps a rank alive: a leader that renews its lease. A rank that no leader wants leaves by itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Lease"]

log = logging.getLogger(__name__)


class Lease:
    """Calls `on_lapse` once, from a thread of its own, when the time of the last renewal is over.

    Nothing is watched before the first renewal.
    """

    def __init__(self, on_lapse: Callable[[], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_lapse = on_lapse
        self._clock = clock
        self._changed = threading.Condition()
        self._until_s: float | None = None
        self._ended = False
        self._thread: threading.Thread | None = None

    def renew(self, lease_s: float) -> None:
        """The rank may live for `lease_s` from now."""
        with self._changed:
            self._until_s = self._clock() + lease_s
            self._changed.notify()
            if self._thread is None and not self._ended:
                self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """Watch no longer."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                assert self._until_s is not None
                left_s = self._until_s - self._clock()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            if self._ended:
                return
            self._ended = True
        log.error("no leader renewed this rank's lease: leaving")
        self._on_lapse()
