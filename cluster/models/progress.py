"""How a pull tells how far it is."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Phases one after another, each counted from nothing to its whole."""

    def begin(self, phase: str) -> None: ...

    def update(self, done: int, whole: int) -> None: ...


class Silent:
    """Tells nobody."""

    def begin(self, phase: str) -> None:
        del phase

    def update(self, done: int, whole: int) -> None:
        del done, whole
