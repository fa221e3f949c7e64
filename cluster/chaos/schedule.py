"""Which fault hits whom: a function of the seed and of who is there, nothing else."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["FAULTS", "ROLES", "Fault", "Plan", "draw", "parse_weights"]

ROLES = ("rank", "leader", "front-door", "controller", "roster", "engine")
FAULTS = ("kill", "freeze", "slow")


@dataclass(frozen=True, slots=True)
class Fault:
    """`targets` are hit at the same moment."""

    kind: str
    role: str
    targets: tuple[str, ...]
    duration_s: float = 0.0
    share: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What may happen, and how often each relative to the others."""

    roles: Mapping[str, float]
    kinds: Mapping[str, float]
    freeze_s: float = 6.0
    slow_s: float = 5.0
    slow_share: float = 0.5
    double: float = 0.0  # the share of faults that hit two targets at once


def draw(plan: Plan, rng: random.Random, targets: Mapping[str, Sequence[str]]) -> Fault:
    """The next fault, given who is there by role. Raises ValueError where the plan's roles are all empty."""
    roles = [role for role, weight in plan.roles.items() if weight > 0 and targets.get(role)]
    if not roles:
        raise ValueError(f"none of {', '.join(plan.roles)} is there to be hit")
    role = rng.choices(roles, [plan.roles[role] for role in roles])[0]
    kind = rng.choices(list(plan.kinds), list(plan.kinds.values()))[0]
    count = 2 if rng.random() < plan.double and len(targets[role]) > 2 else 1
    chosen = tuple(rng.sample(sorted(targets[role]), count))
    if kind == "freeze":
        return Fault(kind, role, chosen, plan.freeze_s)
    if kind == "slow":
        return Fault(kind, role, chosen, plan.slow_s, plan.slow_share)
    return Fault(kind, role, chosen)


def parse_weights(text: str, known: Sequence[str], what: str) -> dict[str, float]:
    """ "kill,freeze=0.5" to weights; one that is not named has none. Raises ValueError naming what is known."""
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, _, weight = item.strip().partition("=")
        if name not in known:
            raise ValueError(f"{what}: {name!r} is none of {', '.join(known)}")
        try:
            weights[name] = float(weight or 1.0)
        except ValueError:
            raise ValueError(f"{what}: {weight!r} is no weight; write {name}=0.5") from None
        if not 0 <= weights[name] < float("inf"):
            raise ValueError(f"{what}: the weight of {name} must be at least 0")
    if not any(weights.values()):
        raise ValueError(f"{what}: at least one must have a weight above 0")
    return weights
