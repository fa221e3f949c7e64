"""Takes an engine, a rank's DP group or all engines of a node out of service."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.operations.fleet import Fleet
from cluster.operations.world import OperationFailed, Tell
from cluster.roster import EngineReport
from protos.shoal.v1 import admin_pb2

__all__ = ["drain"]


def drain(fleet: Fleet, request: admin_pb2.DrainRequest, tell: Tell) -> None:
    """Engines leave for good. A rank's group only takes nothing any more: its rank still serves its experts.

    Raises OperationFailed.
    """
    timeout_s = request.timeout_s if request.HasField("timeout_s") else fleet.spec.drain_timeout_s
    engines, _ = fleet.world.overview()
    if (group := _group_of(request.target, engines)) is not None:
        engine, key = group
        if request.undo:
            fleet.world.stay([key])
            tell(f"{key} takes requests again")
            return
        others = [other for other in fleet.keys_of(fleet.ready()) if other != key]
        _check_left(others, request)
        fleet.empty([key], timeout_s, tell)
        tell(f"{key} of {engine} takes nothing until `shoal drain {request.target} --undo`")
        return
    names = _engines_of(request.target, engines)
    if not names:
        raise OperationFailed(f"there is no engine, rank or node {request.target!r}; `shoal status` shows what is")
    if request.undo:
        fleet.world.stay(fleet.keys_of(names))
        tell(f"{', '.join(names)} take requests again")
        return
    _check_left(fleet.ready(but=names), request)
    fleet.remove(names, timeout_s, tell)


def _check_left(others: list[str], request: admin_pb2.DrainRequest) -> None:
    if not others and not request.force:
        raise OperationFailed("nothing else takes requests: `shoal scale` up first, or --force to let them wait")


def _group_of(target: str, engines: Sequence[EngineReport]) -> tuple[str, str] | None:
    """The engine and the key of the DP group of a rank such as "engine-0/rank-2"."""
    for report in engines:
        size = max(1, len(report.status.ranks) // max(1, len(report.status.dp_groups)))
        for rank in report.status.ranks:
            if target == f"{report.engine}/rank-{rank.rank}":
                return report.engine, f"{report.engine}/{rank.rank // size}"
    return None


def _engines_of(target: str, engines: Sequence[EngineReport]) -> list[str]:
    return [
        report.engine
        for report in engines
        if target == report.engine or any(rank.node == target for rank in report.status.ranks)
    ]
