"""DP groups as a front door sees them: where they are, and who hears their output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from protos.shoal.v1 import session_pb2

__all__ = ["Clock", "GroupAddress", "Sink", "Timer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAddress:
    """A DP group in the roster; `key` is unique among all engines' groups."""

    key: str
    engine: str
    dp_group: int
    host: str
    port: int
    generation: int = 0
    version: str = "1"

    @property
    def target(self) -> str:
        """The address as gRPC writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Sink(Protocol):
    """Who owns a sequence in the front door. Both calls come from the event loop and must not block."""

    def deliver(self, output: session_pb2.SequenceOutput) -> None:
        """New output of the sequence; after one with `finish` nothing more comes."""
        ...

    def lost(self, reason: str) -> None:
        """The group is gone and nothing more comes; what was delivered stands."""
        ...

    def broken(self, error: Exception) -> None:
        """`deliver` raised; the sequence has been cancelled in the group and nothing more comes."""
        ...


class Timer(Protocol):
    """A call that is due."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Time, and calls at a time; the event loop is one."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer: ...
