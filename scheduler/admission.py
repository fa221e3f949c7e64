"""Whether a front door takes one more request: a pure function of its limits and what it has open."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AdmissionLimits", "OpenLoad", "Verdict", "admit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    """How much a front door holds open at once. Raises ValueError naming the field.

    A request costs the tokens of its prompt and the most it may emit, over all of its choices.
    `least_retry_s` and `most_retry_s` bound the hint that a refused client gets.
    """

    max_open_requests: int
    max_open_tokens: int
    least_retry_s: float = 1.0
    most_retry_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_open_requests", "max_open_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 < self.least_retry_s <= self.most_retry_s:
            raise ValueError(f"least_retry_s must be above 0 and at most most_retry_s, not {self.least_retry_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLoad:
    """What is open now, and how fast it goes: `tokens_per_s` is 0 where nothing has been measured."""

    num_requests: int
    num_tokens: int
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is fit for the client. Without `retry_after_s`, a refused request will never be admitted."""

    admitted: bool
    reason: str = ""
    retry_after_s: float | None = None


def admit(limits: AdmissionLimits, load: OpenLoad, cost_tokens: int) -> Verdict:
    """Judge a request that costs `cost_tokens`."""
    if cost_tokens > limits.max_open_tokens:
        return Verdict(False, f"the request may need {cost_tokens} tokens; the limit is {limits.max_open_tokens}")
    excess_tokens = load.num_tokens + cost_tokens - limits.max_open_tokens
    if excess_tokens > 0:
        reason = f"too many tokens are open: {load.num_tokens} of {limits.max_open_tokens}"
        return Verdict(False, reason, _retry_after_s(limits, load, excess_tokens))
    if load.num_requests >= limits.max_open_requests:
        reason = f"too many requests are open: {load.num_requests} of {limits.max_open_requests}"
        mean_tokens = load.num_tokens // max(1, load.num_requests)
        return Verdict(False, reason, _retry_after_s(limits, load, mean_tokens))
    return Verdict(True)


def _retry_after_s(limits: AdmissionLimits, load: OpenLoad, num_tokens: int) -> float:
    """How long `num_tokens` take to go, as far as is known."""
    if load.tokens_per_s <= 0.0:
        return limits.least_retry_s
    return min(max(num_tokens / load.tokens_per_s, limits.least_retry_s), limits.most_retry_s)
