"""The `scheduling` section, resolved for batchers and front doors."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

from cluster.config.schema import Config, FairnessSection
from cluster.front_door.limits import Limits
from scheduler.settings import SchedulingSettings
from scheduler.tenants import FairnessSettings, TenantLimits
from workers.parallel.plan import ParallelPlan

__all__ = ["front_door_limits", "resolve_overlap", "resolve_routing", "scheduling_settings"]


def scheduling_settings(config: Config) -> SchedulingSettings:
    """What every DP group is told. Raises ValueError naming the key."""
    section = config.scheduling
    if section.share_prefixes and not section.prefix_cache:
        raise ValueError("scheduling.share_prefixes: there is nothing to share; set scheduling.prefix_cache: true")
    same = {field.name for field in fields(SchedulingSettings)} & {field.name for field in fields(section)}
    chosen = {name: getattr(section, name) for name in same - {"fairness"}}
    return SchedulingSettings(**chosen, fairness=_fairness(config))


def resolve_routing(config: Config, plan: ParallelPlan, *, spreads_experts: bool) -> str:
    """Where DP groups take their steps together, the fullest sets the time of all: they are filled evenly."""
    if config.scheduling.routing != "auto":
        return config.scheduling.routing
    return "prefix-affinity-even-steps" if plan.data > 1 and spreads_experts else "prefix-affinity"


def resolve_overlap(config: Config, device: str) -> bool:
    """On a CPU planning takes nothing from the step, and a plan made ahead leaves newcomers waiting for a step."""
    return device != "cpu" if config.scheduling.overlap == "auto" else config.scheduling.overlap


def front_door_limits(config: Config) -> Limits:
    """What a front door holds open at once."""
    section = config.scheduling
    return Limits(
        max_open_requests=section.max_open_requests,
        max_open_tokens=section.max_open_tokens,
        background_share=section.background_share,
        resume_window_s=config.cluster.resume_window_s,
    )


def _fairness(config: Config) -> FairnessSettings | None:
    """Between one tenant and itself there is nothing to share out."""
    section, keys = config.scheduling.fairness, config.security.api_key
    names = {one.tenant for one in config.security.api_keys} | (set(keys) if isinstance(keys, dict) else set())
    if section == "auto":
        section = FairnessSection() if len(names) + isinstance(keys, str) > 1 else None
    weights = {one.tenant: one.weight for one in config.security.api_keys if one.weight is not None}
    if section is None:
        if weights:
            raise ValueError("security.api_keys: weights need tenants to share with, and scheduling.fairness")
        return None
    unknown = sorted(set(section.tenants) - names)
    if unknown:
        known = f"there are {', '.join(sorted(names))}" if names else "give security.api_key names: {alice: KEY}"
        raise ValueError(f"scheduling.fairness.tenants.{unknown[0]}: no API key has that name; {known}")
    twice = sorted(set(section.tenants) & set(weights))
    if twice:
        raise ValueError(f"scheduling.fairness.tenants.{twice[0]}: security.api_keys gives a weight already")
    sections = {name: replace(section.default, weight=weight) for name, weight in weights.items()} | section.tenants
    return FairnessSettings(
        tenants={name: TenantLimits(**asdict(limits)) for name, limits in sections.items()},
        default=TenantLimits(**asdict(section.default)),
        output_cost=section.output_cost,
    )
