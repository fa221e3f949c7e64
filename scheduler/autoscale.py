"""How many engines a load needs: a function of what is seen over time, without a clock of its own.

Up quickly and down slowly: a queue or a full cache hurts at once, an idle engine only costs. Between the two
thresholds nothing moves, so that a load which wavers around one of them does not make engines come and go.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AutoscaleSettings", "Autoscaler", "EngineLoads"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleSettings:
    """`most_waiting` is per engine; `cache_high` and `cache_low` are shares of the KV cache in use."""

    least: int = 1
    most: int = 4
    most_waiting: float = 4.0
    cache_high: float = 0.85
    cache_low: float = 0.4
    up_after_s: float = 10.0
    down_after_s: float = 120.0
    pause_s: float = 30.0  # after a change, before the next


@dataclass(frozen=True, slots=True)
class EngineLoads:
    """Of all ready engines together; `num_coming` are on their way up."""

    num_ready: int
    num_coming: int
    num_waiting: int
    num_running: int
    num_used_blocks: int
    num_blocks: int

    @property
    def cache_use(self) -> float:
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0


class Autoscaler:
    """Feed it loads in order of time; each answer is the number of engines there should be."""

    def __init__(self, settings: AutoscaleSettings) -> None:
        self._settings = settings
        self._high_since_s: float | None = None
        self._low_since_s: float | None = None
        self._changed_s: float | None = None

    def wanted(self, now_s: float, loads: EngineLoads) -> int:
        settings = self._settings
        count = loads.num_ready + loads.num_coming
        if count < settings.least or count > settings.most:
            return min(max(count, settings.least), settings.most)
        self._high_since_s = _since(self._high_since_s, now_s, self._is_high(loads))
        self._low_since_s = _since(self._low_since_s, now_s, self._is_low(loads))
        resting = self._changed_s is not None and now_s - self._changed_s < settings.pause_s
        if loads.num_coming or resting:
            return count
        if _lasts(self._high_since_s, now_s, settings.up_after_s) and count < settings.most:
            return self._change(now_s, count + 1)
        if _lasts(self._low_since_s, now_s, settings.down_after_s) and count > settings.least:
            return self._change(now_s, count - 1)
        return count

    def _is_high(self, loads: EngineLoads) -> bool:
        waiting = loads.num_waiting > self._settings.most_waiting * max(1, loads.num_ready)
        return waiting or loads.cache_use > self._settings.cache_high

    def _is_low(self, loads: EngineLoads) -> bool:
        """Whether one engine fewer would still be at ease."""
        if loads.num_waiting or loads.num_ready < 2:
            return False
        return loads.cache_use * loads.num_ready / (loads.num_ready - 1) < self._settings.cache_low

    def _change(self, now_s: float, count: int) -> int:
        self._changed_s, self._high_since_s, self._low_since_s = now_s, None, None
        return count


def _since(since_s: float | None, now_s: float, holds: bool) -> float | None:
    if not holds:
        return None
    return now_s if since_s is None else since_s


def _lasts(since_s: float | None, now_s: float, for_s: float) -> bool:
    return since_s is not None and now_s - since_s >= for_s
