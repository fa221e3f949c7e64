"""What our things are called in Ray."""

from __future__ import annotations

__all__ = [
    "APP",
    "NAMESPACE",
    "ON_HEAD",
    "ROSTER",
    "app_name",
    "engine_names",
    "placement_name",
    "rank_name",
    "rank_prefix",
]

NAMESPACE = "shoal"
APP = "shoal"
ROSTER = "roster"

ON_HEAD = {"node:__internal_head__": 0.001}
"""Resources that only the head's node has: leaders and roster are where Serve's controller is, so that any other host
may be lost without waiting for a new one of them. Without the head there is no Ray to lead with, either."""


def engine_names(count: int) -> tuple[str, ...]:
    """The engines of a cluster."""
    return tuple(f"engine-{index}" for index in range(count))


def app_name(engine: str) -> str:
    """The engine's own Serve application: engines come and go one by one."""
    return f"{APP}-{engine}"


def placement_name(engine: str) -> str:
    """The engine's placement group."""
    return f"{NAMESPACE}/{engine}"


def rank_prefix(engine: str) -> str:
    """What the names of the engine's ranks begin with."""
    return f"{engine}/rank-"


def rank_name(engine: str, rank: int) -> str:
    return f"{rank_prefix(engine)}{rank}"
