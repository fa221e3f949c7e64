"""What each tenant may ask for in a minute, and have open at once.

Buckets that fill steadily: a minute's worth may be spent at once, and then as much as comes in. A request takes one
from its tenant's bucket. Tokens are paid behind: those of the prompt when it is known, those of the answer when it has
ended, so a tenant may get into debt, and waits until it is out of it. Each front door counts for itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.front_door.errors import RateLimited
from cluster.front_door.groups import Clock

__all__ = ["Allowances", "Quota", "Quotas", "Standing"]

_MINUTE_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """None is no bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_open: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quotas:
    """By tenant; `default` for those that have none of their own, each for itself."""

    default: Quota = field(default_factory=Quota)
    tenants: Mapping[str, Quota] = field(default_factory=dict)

    def of(self, tenant: str) -> Quota:
        return self.tenants.get(tenant, self.default)


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one bucket: its size, what is left in it, and in how many seconds it will be full."""

    limit: int
    remaining: int
    reset_s: float


class _Bucket:
    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def take(self, amount: float, now_s: float) -> None:
        """Leaves a debt where there is not enough."""
        self._level = self._filled(now_s) - amount
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Until there is one."""
        return max(0.0, (1.0 - self._filled(now_s)) * _MINUTE_S / self.per_minute)

    def standing(self, now_s: float) -> Standing:
        level = self._filled(now_s)
        missing_s = (self.per_minute - level) * _MINUTE_S / self.per_minute
        return Standing(self.per_minute, max(0, math.floor(level)), missing_s)

    def _filled(self, now_s: float) -> float:
        return min(self.per_minute, self._level + (now_s - self._at_s) * self.per_minute / _MINUTE_S)


class _Allowance:
    """One tenant's."""

    def __init__(self, quota: Quota, now_s: float) -> None:
        self.max_open = quota.max_open
        self.num_open = 0
        self.requests = None if quota.requests_per_minute is None else _Bucket(quota.requests_per_minute, now_s)
        self.tokens = None if quota.tokens_per_minute is None else _Bucket(quota.tokens_per_minute, now_s)


class Allowances:
    """Belongs to the event loop. Tenants are as many as there are keys, so nothing of them is ever forgotten."""

    def __init__(self, quotas: Quotas, clock: Clock) -> None:
        self._quotas = quotas
        self._clock = clock
        self._tenants: dict[str, _Allowance] = {}

    def check(self, tenant: str) -> None:
        """Whether a new request may come. Raises RateLimited with the time to wait."""
        allowance, now_s = self._of(tenant), self._clock.time()
        for bucket, unit in ((allowance.requests, "requests"), (allowance.tokens, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s(now_s)) > 0:
                raise RateLimited(
                    f"the limit of {bucket.per_minute} {unit} per minute is reached; try again in {wait_s:.1f} s",
                    retry_after_s=wait_s,
                )

    def enter(self, tenant: str) -> None:
        """A request is open from now on. Raises RateLimited where too many are."""
        allowance = self._of(tenant)
        if allowance.max_open is not None and allowance.num_open >= allowance.max_open:
            raise RateLimited(f"{allowance.max_open} requests at once are the limit", retry_after_s=1.0)
        allowance.num_open += 1

    def leave(self, tenant: str) -> None:
        self._of(tenant).num_open -= 1

    def count(self, tenant: str) -> None:
        """A request has been taken."""
        if (bucket := self._of(tenant).requests) is not None:
            bucket.take(1, self._clock.time())

    def spend(self, tenant: str, num_tokens: int) -> None:
        """Tokens of a prompt or an answer."""
        if (bucket := self._of(tenant).tokens) is not None:
            bucket.take(num_tokens, self._clock.time())

    def standings(self, tenant: str) -> dict[str, Standing]:
        """By "requests" and "tokens", where there is a bound."""
        allowance, now_s = self._of(tenant), self._clock.time()
        buckets = {"requests": allowance.requests, "tokens": allowance.tokens}
        return {unit: bucket.standing(now_s) for unit, bucket in buckets.items() if bucket is not None}

    def _of(self, tenant: str) -> _Allowance:
        allowance = self._tenants.get(tenant)
        if allowance is None:
            allowance = self._tenants[tenant] = _Allowance(self._quotas.of(tenant), self._clock.time())
        return allowance
