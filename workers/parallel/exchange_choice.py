"""Which exchange the ranks of a stage get: their host's memory where they share one, else a process group."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from workers.parallel.exchange import Exchange, ProcessGroupExchange
from workers.parallel.host_meeting import Board, meet
from workers.settings import EngineSettings

__all__ = ["join_exchange"]

log = logging.getLogger(__name__)

_AS_CONFIGURED = "as configured"


def join_exchange(
    settings: EngineSettings,
    rank: int,
    members: Sequence[int],
    hosts: Mapping[int, str] | Sequence[str],
    board: Board,
    *,
    group: Any,
    generation: int,
    join_timeout_s: float,
    step_timeout_s: float,
) -> Exchange:
    """Among `members`, which must all call this; `hosts` has every member's.

    `group` is their process group, for where they share no memory: torch has the whole world make each group, so it is
    made before that is known. The exchange's kind says what carries the rows and, for a fallback, why.
    """
    found: Exchange | str | None = _obstacle(settings, [hosts[member] for member in members])
    if found is None:
        found = meet(
            board,
            rank,
            members,
            generation=generation,
            join_timeout_s=join_timeout_s,
            step_timeout_s=step_timeout_s,
        )
    if isinstance(found, str):
        from deepspeed import comm  # heavy, and shared memory needs none of it

        backend = "nccl" if settings.device == "cuda" else "gloo"
        kind = backend if found == _AS_CONFIGURED else f"{backend} ({found})"
        found = ProcessGroupExchange(index=members.index(rank), size=len(members), group=group, kind=kind, comm=comm)
    level = logging.WARNING if found.kind.startswith("gloo (") else logging.INFO
    log.log(level, "rank %d: experts are reached over %s", rank, found.kind)
    return found


def _obstacle(settings: EngineSettings, hosts: Sequence[str]) -> str | None:
    """What is known to keep the ranks at these hosts from exchanging through memory."""
    if settings.device != "cpu" or settings.collectives in ("gloo", "nccl"):
        return _AS_CONFIGURED
    return "ranks on several hosts" if len(set(hosts)) > 1 else None
