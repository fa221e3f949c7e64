"""How many users a ramping load has at a moment."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Ramp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ramp:
    """Climbs to `num_users` in equal steps over the first half of `total_s`, then stays: where does latency turn up?"""

    num_users: int
    total_s: float
    num_steps: int = 5

    def __post_init__(self) -> None:
        if self.num_users < 1 or self.num_steps < 1 or self.total_s <= 0:
            raise ValueError(f"a ramp needs users, steps and time, not {self}")

    def users_at(self, run_s: float) -> int | None:
        """None once the time is over."""
        if run_s >= self.total_s:
            return None
        step_s = self.total_s / 2 / self.num_steps
        step = min(self.num_steps, math.floor(run_s / step_s) + 1)
        return math.ceil(self.num_users * step / self.num_steps)
