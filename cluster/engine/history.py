"""What a leader remembers of its engine's regroups and starts, for `shoal status` and for metrics."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import StrEnum

from protos.shoal.v1 import admin_pb2

__all__ = ["History", "Occasion"]

_BOUNDS_S = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 15.0, 30.0, 60.0, 300.0)


class Occasion(StrEnum):
    """What a regroup was for."""

    LOST = "lost"  # ranks died, froze or were cut off
    RETURNED = "returned"  # they are back
    TAKEN_OVER = "taken-over"  # another leader finishes what one left behind


@dataclass(slots=True)
class _Total:
    seconds: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_S) + 1))


class History:
    """Under this leader; another one begins anew. A regroup's seconds are those in which no rank ran a step."""

    def __init__(self) -> None:
        self._totals = {occasion: _Total() for occasion in Occasion}
        self._cause = ""
        self._last_s = 0.0
        self._num_restarts = 0
        self._restart_cause = ""

    def regrouped(self, occasion: Occasion, cause: str, seconds: float) -> None:
        total = self._totals[occasion]
        total.seconds += seconds
        total.counts[bisect_left(_BOUNDS_S, seconds)] += 1
        self._cause, self._last_s = cause, seconds

    def restarted(self, cause: str) -> None:
        """All ranks, because none could go on."""
        self._num_restarts += 1
        self._restart_cause = cause

    def tell(self, status: admin_pb2.EngineStatus) -> None:
        status.num_restarts, status.last_restart_cause = self._num_restarts, self._restart_cause
        status.num_regroups = sum(sum(total.counts) for total in self._totals.values())
        status.last_regroup_cause, status.last_regroup_s = self._cause, self._last_s
        for occasion, total in self._totals.items():
            status.regroups.add(occasion=occasion, bounds_s=_BOUNDS_S, counts=total.counts, seconds=total.seconds)
