"""What an operation sees of the cluster and can do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.app.spec import ClusterSpec
from cluster.roster import EngineReport, FrontDoorReport

__all__ = ["OperationFailed", "Tell", "World"]

Tell = Callable[[str], None]
"""One line of news for whoever asked."""


class OperationFailed(Exception):
    """It cannot be done, or was taken back; the message is for the operator."""


class World(Protocol):
    """Calls block. Where the cluster itself is ending, `wait` raises OperationFailed."""

    def overview(self) -> tuple[Sequence[EngineReport], Sequence[FrontDoorReport]]: ...

    def start_engine(self, name: str, spec: ClusterSpec) -> None:
        """Places it; that it is ready shows in the overview."""
        ...

    def stop_engine(self, name: str) -> None:
        """Ends it with all that is left on it."""
        ...

    def leave(self, keys: Sequence[str], timeout_s: float) -> None:
        """These DP groups get nothing new; what runs there after `timeout_s` is handed over."""
        ...

    def stay(self, keys: Sequence[str]) -> None:
        """The opposite."""
        ...

    def close_doors(self, node: str, timeout_s: float) -> None:
        """The node's front doors take no new request; streams still open after `timeout_s` are to go on elsewhere."""
        ...

    def open_doors(self, node: str) -> None:
        """The opposite."""
        ...

    def weigh(self, weights: Sequence[tuple[str, float]]) -> None:
        """Shares of new requests by version; 1 for those that are not named."""
        ...

    def now_s(self) -> float: ...

    def wait(self, seconds: float) -> None: ...
