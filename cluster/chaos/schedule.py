"""Which fault hits whom: a function of the seed and of who is there, nothing else."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["FAULTS", "HOSTS", "NODE", "ROLES", "Fault", "Plan", "crossed", "draw", "parse_weights"]

ROLES = ("rank", "leader", "front-door", "controller", "roster", "engine", "node")
FAULTS = ("kill", "freeze", "slow", "partition")
NODE = "node/"
"""Before a node's address, where it is a target."""
HOSTS = ("host", "node")
"""Roles of which two at once would be most of a small cluster; while one is down, who is left is not known well."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`targets` are hit at the same moment; what ends by itself does so after `duration_s`."""

    kind: str
    role: str
    targets: tuple[str, ...]
    duration_s: float = 0.0
    share: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.kind} {self.role}" + " (two at once)" * (len(self.targets) > 1)


def _lasting() -> Mapping[str, float]:
    return {"freeze": 6.0, "slow": 5.0, "partition": 6.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What may happen, and how often relative to the rest, by (kind, role)."""

    weights: Mapping[tuple[str, str], float]
    lasting_s: Mapping[str, float] = field(default_factory=_lasting)  # by kind, or by "kind role"
    slow_share: float = 0.5
    double: float = 0.0  # the share of faults that hit two targets at once
    overlap: float = 0.0  # the share of faults behind which the next does not wait for a cluster that is whole again


def crossed(roles: Mapping[str, float], kinds: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """Every kind for every role."""
    return {
        (kind, role): often * weight
        for role, weight in roles.items()
        for kind, often in kinds.items()
        if often * weight
    }


def draw(plan: Plan, rng: random.Random, targets: Mapping[str, Sequence[str]]) -> Fault:
    """The next fault, given who is there by role. Raises ValueError where nobody of the plan's is."""
    possible = {pair: weight for pair, weight in plan.weights.items() if weight > 0 and targets.get(pair[1])}
    if not possible:
        raise ValueError(f"none of {', '.join(sorted({role for _, role in plan.weights}))} is there to be hit")
    kind, role = rng.choices(list(possible), list(possible.values()))[0]
    two = rng.random() < plan.double and len(targets[role]) > 2 and role not in HOSTS
    chosen = tuple(rng.sample(sorted(targets[role]), 2 if two else 1))
    lasts_s = plan.lasting_s.get(f"{kind} {role}", plan.lasting_s.get(kind, 0.0))
    return Fault(kind, role, chosen, lasts_s, plan.slow_share if kind == "slow" else 0.0)


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
