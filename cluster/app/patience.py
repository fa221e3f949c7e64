"""How long a start may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.engine.states import EngineState

__all__ = ["Patience"]


class Patience:
    """Counts the time in which no engine loads: loading large weights has a limit of its own, ranks that find no
    place or no peers would wait for ever."""

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._looked_s = clock()
        self._waited_s = 0.0

    def ends(self, states: Iterable[str]) -> bool:
        """Whether it has, now that the engines are in `states`."""
        now = self._clock()
        if EngineState.LOADING not in set(states):
            self._waited_s += now - self._looked_s
        self._looked_s = now
        return self._waited_s > self.limit_s
