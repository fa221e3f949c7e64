"""More engines, or fewer."""

from __future__ import annotations

from cluster.operations.fleet import Fleet
from cluster.operations.world import OperationFailed, Tell

__all__ = ["scale"]


def scale(fleet: Fleet, count: int, tell: Tell) -> None:
    """Raises OperationFailed. The newest engines leave first."""
    if count < 1:
        raise OperationFailed("engines: at least one is needed; Ctrl-C at `shoal serve` ends the cluster")
    names = fleet.names
    if count > len(names):
        fleet.add(count - len(names), fleet.spec, tell)
    elif count < len(names):
        leaving = names[count:]
        if not fleet.ready(but=leaving):
            raise OperationFailed(f"none of {', '.join(names[:count])} is ready; the others stay")
        fleet.remove(leaving, fleet.spec.drain_timeout_s, tell)
    tell(f"{len(fleet.names)} engines: {', '.join(fleet.names)}")
