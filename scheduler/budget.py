"""How long a step takes, learnt from those that were, and how many tokens of prefill it may therefore hold."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["StepTimeModel", "prefill_budget"]

_WINDOW = 9
_RECENT = 0.95  # what an observation's weight keeps with each one that follows
_DRIFT = 0.5
_LEAST_WEIGHT = 0.01


@dataclass(slots=True)
class _Size:
    """Steps of about one size: the median of the last few, which one slow step does not move."""

    num_tokens: deque[int] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    median_tokens: int = 0
    median_s: float = 0.0
    seen_at: int = 0

    def add(self, num_tokens: int, step_s: float, now: int) -> None:
        self.num_tokens.append(num_tokens)
        self.step_s.append(step_s)
        self.median_tokens = sorted(self.num_tokens)[len(self.num_tokens) // 2]
        self.median_s = sorted(self.step_s)[len(self.step_s) // 2]
        self.seen_at = now


class StepTimeModel:
    """`fixed_s + token_s * tokens`, fitted to the medians of steps of 1, 2 to 3, 4 to 7 ... tokens.

    The fit is by least squares, in which short steps and what was seen lately weigh more; neither part is negative.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._num_observed = 0
        self._line: tuple[float, float] | None = None
        self._drift = 1.0

    @property
    def num_observed(self) -> int:
        return self._num_observed

    @property
    def ready(self) -> bool:
        """Whether steps of more than one size were seen, so that the two parts can be told apart."""
        return len(self._sizes) >= 2 and self._num_observed >= _WINDOW

    @property
    def most_tokens(self) -> int:
        """About the largest step seen."""
        return max((size.median_tokens for size in self._sizes.values()), default=0)

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Learn from a step. One that took no time teaches nothing."""
        if step_s <= 0.0:
            return
        if self.ready:
            ratio = step_s / self.step_s(num_tokens)
            self._drift += _DRIFT * (min(max(ratio, 0.5), 2.0) - self._drift)
        self._num_observed += 1
        size = self._sizes.setdefault(num_tokens.bit_length(), _Size())
        size.add(num_tokens, step_s, self._num_observed)
        self._line = None

    def step_s(self, num_tokens: float) -> float:
        """How long a step of so many tokens takes; 0 where nothing is known."""
        fixed_s, token_s = self._fit()
        return fixed_s + token_s * num_tokens

    def tokens_within(self, step_s: float) -> float:
        """How many tokens a step of that length holds now; below 0 where it cannot even begin.

        "Now", because steps like the last ones may take longer than the line says: their contexts grow.
        """
        fixed_s, token_s = self._fit()
        return (step_s / self._drift - fixed_s) / token_s if token_s > 0.0 else float("inf")

    def _fit(self) -> tuple[float, float]:
        if self._line is None:
            self._line = self._least_squares()
        return self._line

    def _least_squares(self) -> tuple[float, float]:
        s0 = s1 = sx = sy = sxy = sxx = 0.0
        for size in self._sizes.values():
            recent = max(_LEAST_WEIGHT, _RECENT ** (self._num_observed - size.seen_at))
            weight = recent * min(len(size.step_s), _WINDOW) / size.median_s
            x, y = size.median_tokens, size.median_s
            s0 += 1.0
            s1 += weight
            sx += weight * x
            sy += weight * y
            sxy += weight * x * y
            sxx += weight * x * x
        if s0 == 0.0:
            return 0.0, 0.0
        spread = s1 * sxx - sx * sx
        token_s = (s1 * sxy - sx * sy) / spread if s0 > 1.0 else sxy / sxx
        if token_s <= 0.0:
            return sy / s1, 0.0
        fixed_s = (sy - token_s * sx) / s1
        return (fixed_s, token_s) if fixed_s >= 0.0 else (0.0, sxy / sxx)


def prefill_budget(
    model: StepTimeModel, *, num_decodes: int, target_step_s: float, min_chunk_tokens: int, max_tokens: int
) -> int:
    """Tokens of prefill beside `num_decodes` decodes so that the step keeps to its target; all of `max_tokens` without.

    Never less than `min_chunk_tokens`, so that prompts move on even where decoding alone takes longer, and never far
    beyond what was tried before.
    """
    if target_step_s <= 0.0:
        return max_tokens
    within = min(model.tokens_within(target_step_s), 2.0 * model.most_tokens) - num_decodes
    return min(max(int(within), min_chunk_tokens), max_tokens)
