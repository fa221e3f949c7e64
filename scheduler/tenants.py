"""What tenants may have, and what each has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Account", "FairnessSettings", "TenantLimits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantLimits:
    """One tenant's share of a DP group, and its bounds there; 0 is no bound. Raises ValueError naming the field.

    With twice the weight, a tenant that always has work gets twice the service. `max_requests` are open ones,
    `max_queued_tokens` those of waiting ones, `max_blocks` what running ones may come to hold.
    """

    weight: float = 1.0
    max_requests: int = 0
    max_queued_tokens: int = 0
    max_blocks: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < float("inf"):
            raise ValueError(f"weight must be above 0, not {self.weight}")
        for name in ("max_requests", "max_queued_tokens", "max_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (no bound) or above, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FairnessSettings:
    """Tenants by name, and what holds for all others. A token of a prompt costs 1, one of an answer `output_cost`."""

    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)
    default: TenantLimits = field(default_factory=TenantLimits)
    output_cost: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.output_cost < float("inf"):
            raise ValueError(f"output_cost must be 0 or above, not {self.output_cost}")

    def limits_of(self, tenant: str) -> TenantLimits:
        return self.tenants.get(tenant, self.default)


@dataclass(slots=True)
class Account:
    """What a tenant has open, and `service`: the cost of what it got so far, over its weight."""

    limits: TenantLimits
    service: float = 0.0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_running: int = 0
    num_reserved_blocks: int = 0

    @property
    def idle(self) -> bool:
        return not self.num_waiting and not self.num_running
