"""An event loop whose clock jumps to the next timer as soon as nobody has anything to do: hours pass in no time."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

__all__ = ["JumpingLoop"]

_THREADS_S = 0.0005  # for answers of other threads, which come at no time of this clock


class _Selector(selectors.DefaultSelector):
    jumped_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        found = super().select(_THREADS_S)
        if not found:
            self.jumped_s += timeout
        return found


class JumpingLoop(asyncio.SelectorEventLoop):
    """For `asyncio.Runner(loop_factory=JumpingLoop)`."""

    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.jumped_s
