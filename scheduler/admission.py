"""Whether a front door takes one more request: a pure function of its limits and what it has open."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AdmissionLimits", "OpenLoad", "Verdict", "admit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    """How much a front door holds open at once. Raises ValueError naming the field.

    A request costs the tokens of its prompt and the most it may emit, over all of its choices.
    Requests of a class below the default one (priority above 0) are taken only while so many are open as
    `background_share` of both limits says: they are the first to be turned away, and what is left stays for the others.
    `least_retry_s` and `most_retry_s` bound the hint that a refused client gets.
    """

    max_open_requests: int
    max_open_tokens: int
    background_share: float = 1.0
    least_retry_s: float = 1.0
    most_retry_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_open_requests", "max_open_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 < self.background_share <= 1.0:
            raise ValueError(f"background_share must be above 0 and at most 1, not {self.background_share}")
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


def admit(limits: AdmissionLimits, load: OpenLoad, cost_tokens: int, *, priority: int = 0) -> Verdict:
    """Judge a request that costs `cost_tokens`."""
    share = limits.background_share if priority > 0 else 1.0
    max_tokens, max_requests = int(limits.max_open_tokens * share), max(1, int(limits.max_open_requests * share))
    of_class = "" if share == 1.0 else " for this priority"
    if cost_tokens > max_tokens:
        return Verdict(False, f"the request may need {cost_tokens} tokens; the limit{of_class} is {max_tokens}")
    excess_tokens = load.num_tokens + cost_tokens - max_tokens
    if excess_tokens > 0:
        reason = f"too many tokens are open{of_class}: {load.num_tokens} of {max_tokens}"
        return Verdict(False, reason, _retry_after_s(limits, load, excess_tokens))
    if load.num_requests >= max_requests:
        reason = f"too many requests are open{of_class}: {load.num_requests} of {max_requests}"
        mean_tokens = load.num_tokens // max(1, load.num_requests)
        return Verdict(False, reason, _retry_after_s(limits, load, mean_tokens))
    return Verdict(True)


def _retry_after_s(limits: AdmissionLimits, load: OpenLoad, num_tokens: int) -> float:
    """How long `num_tokens` take to go, as far as is known."""
    if load.tokens_per_s <= 0.0:
        return limits.least_retry_s
    return min(max(num_tokens / load.tokens_per_s, limits.least_retry_s), limits.most_retry_s)
