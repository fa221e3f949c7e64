"""The doctor's part in a start: a look before ranks are placed, and the reason where a start comes to nothing."""

from __future__ import annotations

from cluster.app.spec import ClusterSpec
from cluster.doctor.facts import Wanted
from cluster.doctor.finding import Finding, Level

__all__ = ["look_before", "look_why"]

_BEFORE_S = 30.0
_WHY_S = 15.0
_WHY_LIMIT_S = 45.0


def look_before(spec: ClusterSpec) -> tuple[Finding, ...]:
    """What on the nodes of the joined cluster would keep ranks from running: failures alone."""
    from cluster.doctor.checks import PREFLIGHT
    from cluster.doctor.nodes import examine_cluster

    return _failures(examine_cluster(_wanted(spec), checks=PREFLIGHT, with_links=False, timeout_s=_BEFORE_S))


def look_why(spec: ClusterSpec) -> tuple[Finding, ...]:
    """Everything that the doctor finds wrong in 45 s, with the room for the ranks first."""
    import ray

    from cluster.doctor.checks import room
    from cluster.doctor.nodes import examine_cluster
    from cluster.engine.bundles import bundle_ranks

    resource = "GPU" if spec.settings.device == "cuda" else "CPU"
    has = {n["NodeManagerHostname"]: n["Resources"].get(resource, 0.0) for n in ray.nodes() if n["Alive"]}
    bundles = bundle_ranks(spec.settings, max(has.values(), default=0.0))
    place = room(has, resource, bundles.each * bundles.ranks, bundles.count * spec.engines)
    return _failures((place, *examine_cluster(_wanted(spec), timeout_s=_WHY_S, limit_s=_WHY_LIMIT_S)))


def _wanted(spec: ClusterSpec) -> Wanted:
    settings = spec.settings
    return Wanted(
        model_path=settings.model_path,
        interface=spec.network.interface,
        tensor=settings.plan.tensor,
        device=settings.device,
    )


def _failures(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.level is Level.FAILURE)
