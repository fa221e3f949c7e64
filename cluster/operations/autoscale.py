"""The load of all engines, from what front doors heard of their groups."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.engine.states import EngineState
from cluster.roster import EngineReport, FrontDoorReport, GroupTraffic
from scheduler.autoscale import EngineLoads

__all__ = ["loads_of"]


def loads_of(engines: Sequence[EngineReport], doors: Sequence[FrontDoorReport], *, names: Sequence[str]) -> EngineLoads:
    """Of the engines that there should be; those that are not ready are coming."""
    ready = {report.engine for report in engines if report.status.state == EngineState.READY and report.engine in names}
    groups: dict[str, GroupTraffic] = {}
    for door in doors:
        for group in door.traffic:
            if group.engine in ready:
                # Each front door tells what the group said to it last: the highest is the safest.
                known = groups.get(group.key)
                if known is None or known.num_waiting + known.num_running < group.num_waiting + group.num_running:
                    groups[group.key] = group
    return EngineLoads(
        num_ready=len(ready),
        num_coming=len(set(names) - ready),
        num_waiting=sum(group.num_waiting for group in groups.values()),
        num_running=sum(group.num_running for group in groups.values()),
        num_used_blocks=sum(group.num_blocks - group.num_free_blocks for group in groups.values()),
        num_blocks=sum(group.num_blocks for group in groups.values()),
    )
