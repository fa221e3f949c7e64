"""What `Admin.Status` answers: what leaders and front doors said of themselves, and the groups' loads as seen here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version

from cluster.app.spec import ClusterSpec
from cluster.front_door.link import Link
from cluster.roster import Decisions, EngineReport, FrontDoorReport
from protos.shoal.v1 import admin_pb2
from scheduler.versions import shares_of

__all__ = ["status_response"]


def status_response(
    spec: ClusterSpec,
    engines: Sequence[EngineReport],
    front_doors: Sequence[FrontDoorReport],
    links: Mapping[str, Link],
    decisions: Decisions,
) -> admin_pb2.StatusResponse:
    """For one front door; `links` are its own, `decisions` what it has heard of."""
    response = admin_pb2.StatusResponse(version=version("shoal"), model=spec.card.name)
    leaving = dict(decisions.leaving)
    shares = shares_of({report.version for report in engines}, dict(decisions.weights))
    loads = {(link.address.engine, link.address.dp_group): link for link in links.values()}
    for report in engines:
        engine = response.engines.add()
        engine.CopyFrom(report.status)
        engine.leader_pid, engine.leader_node = report.pid, report.node
        engine.version = report.version
        engine.weight = shares.get(report.version, 1.0)
        for group in engine.dp_groups:
            group.draining = f"{report.engine}/{group.index}" in leaving
            if link := loads.get((report.engine, group.index)):
                _add_load(group, link)
        engine.draining = bool(engine.dp_groups) and all(group.draining for group in engine.dp_groups)
    for door in front_doors:
        response.front_doors.add(
            id=door.id,
            node=door.node,
            pid=door.pid,
            open_requests=door.open_requests,
            dp_groups=door.dp_groups,
            draining=door.draining,
        )
    response.warnings.extend(_warnings(spec, engines, front_doors))
    return response


def _add_load(group: admin_pb2.DPGroupStatus, link: Link) -> None:
    load = link.load
    group.num_running = load.num_running
    group.num_waiting = load.num_waiting
    group.num_free_blocks = load.num_free_blocks
    group.num_blocks = load.num_blocks
    group.block_size = link.info.block_size
    group.num_preemptions = load.num_preemptions


def _warnings(
    spec: ClusterSpec, engines: Iterable[EngineReport], front_doors: Iterable[FrontDoorReport]
) -> Iterator[str]:
    yield from spec.warnings
    for engine in engines:
        if engine.error:
            yield f"{engine.engine}: {engine.error}"
        if engine.status.collectives.startswith("gloo ("):
            yield f"{engine.engine}: tensor-parallel sums go over {engine.status.collectives}"
        if "gloo (" in engine.status.dispatch:
            yield f"{engine.engine}: experts are reached by {engine.status.dispatch}"
    for door in front_doors:
        if door.error:
            yield f"front door {door.id}: {door.error}"
