"""Takes an engine, a rank's DP group, or a node with its engines and front doors out of service."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cluster.operations.fleet import Fleet
from cluster.operations.world import OperationFailed, Tell
from cluster.roster import EngineReport, FrontDoorReport
from protos.shoal.v1 import admin_pb2

__all__ = ["drain"]


def drain(fleet: Fleet, request: admin_pb2.DrainRequest, tell: Tell) -> None:
    """Engines leave for good. A rank's group only takes nothing any more: its rank still serves its experts. A node's
    front doors finish what is open and stay closed.

    Raises OperationFailed.
    """
    timeout_s = request.timeout_s if request.HasField("timeout_s") else fleet.spec.drain_timeout_s
    engines, doors = fleet.world.overview()
    if (key := _group_of(request.target, engines)) is not None:
        _drain_group(fleet, key, request, timeout_s, tell)
        return
    names = _engines_of(request.target, engines)
    has_doors = any(door.node == request.target for door in doors)
    if not names and not has_doors:
        raise OperationFailed(_unknown(request.target, engines, doors))
    if request.undo:
        _undo(fleet, request.target, names, tell, has_doors=has_doors)
        return
    if names:
        _check_left(fleet.ready(but=names), request)
    if has_doors:
        _close_doors(fleet, request, timeout_s, tell)
    if names:
        fleet.remove(names, timeout_s, tell)


def _drain_group(fleet: Fleet, key: str, request: admin_pb2.DrainRequest, timeout_s: float, tell: Tell) -> None:
    if request.undo:
        fleet.world.stay([key])
        tell(f"{key} takes requests again")
        return
    _check_left([other for other in fleet.keys_of(fleet.ready()) if other != key], request)
    fleet.empty([key], timeout_s, tell)
    tell(f"{key} takes nothing until `shoal drain {request.target} --undo`")


def _undo(fleet: Fleet, target: str, names: list[str], tell: Tell, *, has_doors: bool) -> None:
    if names:
        fleet.world.stay(fleet.keys_of(names))
        tell(f"{', '.join(names)} take requests again")
    if has_doors:
        fleet.world.open_doors(target)
        tell(f"the front doors on {target} are started again")


def _close_doors(fleet: Fleet, request: admin_pb2.DrainRequest, timeout_s: float, tell: Tell) -> None:
    """First of all: clients that are sent elsewhere find the engines there."""
    node = request.target
    elsewhere = [door for door in fleet.world.overview()[1] if door.node != node and door.ready]
    if not elsewhere and not request.force:
        raise OperationFailed(
            f"the only front doors are on {node}: clients would find none; start with more cluster.front_doors, on "
            "more nodes, or --force"
        )
    fleet.world.close_doors(node, timeout_s)
    tell(f"front doors on {node}: no new requests, up to {timeout_s:g} s for open streams; then they go on elsewhere")
    if fleet.closed(node, timeout_s):
        tell(f"front doors on {node} are closed")
    else:
        tell(f"a front door on {node} does not say that it has let go; its clients resume elsewhere")


def _check_left(others: list[str], request: admin_pb2.DrainRequest) -> None:
    if not others and not request.force:
        raise OperationFailed("nothing else takes requests: `shoal scale` up first, or --force to let them wait")


def _group_of(target: str, engines: Sequence[EngineReport]) -> str | None:
    """The key of the DP group of a rank such as "engine-0/rank-2"."""
    for report in engines:
        size = max(1, len(report.status.ranks) // max(1, len(report.status.dp_groups)))
        for rank in report.status.ranks:
            if target == f"{report.engine}/rank-{rank.rank}":
                return f"{report.engine}/{rank.rank // size}"
    return None


def _engines_of(target: str, engines: Sequence[EngineReport]) -> list[str]:
    return [
        report.engine
        for report in engines
        if target == report.engine or any(rank.node == target for rank in report.status.ranks)
    ]


def _unknown(target: str, engines: Sequence[EngineReport], doors: Sequence[FrontDoorReport]) -> str:
    """What there is instead, the nearest name above all."""
    nodes = {rank.node for report in engines for rank in report.status.ranks} | {door.node for door in doors}
    ranks = [f"{report.engine}/rank-{rank.rank}" for report in engines for rank in report.status.ranks]
    names = [*(report.engine for report in engines), *sorted(nodes - {""}), *ranks]
    near = difflib.get_close_matches(target, names, n=1)
    hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(names) or 'none'}"
    return f"there is no engine, rank or node {target!r}; {hint}"
