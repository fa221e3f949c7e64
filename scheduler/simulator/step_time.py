"""How long a step takes, as a function of what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.plan import StepPlan

__all__ = ["Features", "StepTime"]

Features = tuple[float, float, float, float]
"""One step as (1, tokens of prefill, sequences with one token, millions of (token, earlier token) pairs)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Linear in what a step holds. The defaults are of the order of a small model on one accelerator."""

    fixed_s: float = 0.008
    prefill_token_s: float = 0.00004
    decode_sequence_s: float = 0.00006
    context_s: float = 0.004  # for a million pairs of a token and one that it attends to

    @classmethod
    def fit(cls, steps: Iterable[tuple[Features, float]]) -> StepTime:
        """Least squares over measured steps and their seconds; a part that would be negative is left out.

        Raises ValueError where the steps are too few or too alike to tell the parts apart.
        """
        steps = list(steps)
        parts = [0, 1, 2, 3]
        while True:
            solution = _least_squares([([x[i] for i in parts], y) for x, y in steps])
            negative = [part for part, value in zip(parts, solution, strict=True) if value < 0.0]
            if not negative:
                break
            parts.remove(min(negative, key=lambda part: solution[parts.index(part)]))
        values = dict(zip(parts, solution, strict=True))
        return cls(
            fixed_s=values.get(0, 0.0),
            prefill_token_s=values.get(1, 0.0),
            decode_sequence_s=values.get(2, 0.0),
            context_s=values.get(3, 0.0),
        )

    @staticmethod
    def features(plan: StepPlan) -> Features:
        num_prefill = num_decodes = num_pairs = 0
        for one in plan.sequences:
            num_pairs += one.num_tokens * (2 * one.num_computed + one.num_tokens + 1) // 2
            if one.num_tokens == 1:
                num_decodes += 1
            else:
                num_prefill += one.num_tokens
        return (1.0, num_prefill, num_decodes, num_pairs / 1e6)

    def seconds(self, plan: StepPlan) -> float:
        return self.seconds_of(self.features(plan))

    def seconds_of(self, features: Features) -> float:
        one, num_prefill, num_decodes, pairs = features
        return (
            one * self.fixed_s
            + num_prefill * self.prefill_token_s
            + num_decodes * self.decode_sequence_s
            + pairs * self.context_s
        )


def _least_squares(rows: Sequence[tuple[Sequence[float], float]]) -> list[float]:
    """Solve the normal equations of relative errors by elimination with pivoting."""
    size = len(rows[0][0]) if rows else 0
    matrix = [[0.0] * (size + 1) for _ in range(size)]
    for x, y in rows:
        for i in range(size):
            for j in range(size):
                matrix[i][j] += x[i] * x[j] / (y * y)
            matrix[i][size] += x[i] / y
    scales = [matrix[i][i] for i in range(size)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(matrix[row][column]))
        if abs(matrix[pivot][column]) <= 1e-9 * scales[pivot]:
            raise ValueError("the measured steps are too few or too alike to fit a step time")
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        scales[column], scales[pivot] = scales[pivot], scales[column]
        for row in range(size):
            if row != column:
                factor = matrix[row][column] / matrix[column][column]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[column], strict=True)]
    if not rows:
        raise ValueError("no steps were measured")
    return [matrix[row][size] / matrix[row][row] for row in range(size)]
