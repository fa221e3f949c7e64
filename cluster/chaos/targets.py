"""Whom a fault's target names, by what leaders and front doors say of themselves."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.chaos.injector import Process
from cluster.chaos.schedule import NODE
from cluster.roster import EngineReport, FrontDoorReport

__all__ = ["processes_of"]


def processes_of(
    target: str, engines: Sequence[EngineReport], front_doors: Sequence[FrontDoorReport]
) -> Sequence[Process]:
    """The processes that a target names; none where there is no such thing."""
    if target.startswith(NODE):
        there = [(rank.node, rank.pid) for engine in engines for rank in engine.status.ranks]
        there += [(engine.node, engine.pid) for engine in engines]
        there += [(door.node, door.pid) for door in front_doors]
        return [process for process in there if process[0] == target.removeprefix(NODE)]
    for door in front_doors:
        if target == f"front-door/{door.id}":
            return [(door.node, door.pid)]
    for engine in engines:
        ranks = engine.status.ranks
        if target == engine.engine:
            return [(rank.node, rank.pid) for rank in ranks]
        if target == f"{engine.engine}/leader":
            return [(engine.node, engine.pid)]
        for rank in ranks:
            if target == f"{engine.engine}/rank-{rank.rank}":
                return [(rank.node, rank.pid)]
    return ()
