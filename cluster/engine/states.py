"""The life of an engine, as a table."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["TRANSITIONS", "EngineEvent", "EngineState", "after"]


class EngineState(StrEnum):
    """What `shoal status` shows."""

    CLAIMING = "claiming"  # the leader has no engine yet
    PLACING = "placing"  # waiting for Ray to give processes
    JOINING = "joining"  # the ranks find each other
    LOADING = "loading"
    PROBING = "probing"  # a first token through every rank
    READY = "ready"
    REGROUPING = "regrouping"  # ranks were lost or come in: the others close up, with all they hold
    RESTARTING = "restarting"  # no group is left to go on: all ranks are taken down, to start again
    DRAINING = "draining"
    FAILED = "failed"  # it cannot be served, and nothing that the leader can do will change that
    STOPPED = "stopped"


class EngineEvent(StrEnum):
    """What happens to an engine."""

    CLAIMED = "claimed"
    PLACED = "placed"
    ADOPTED = "adopted"  # the ranks of an earlier leader live, loaded
    JOINED = "joined"
    LOADED = "loaded"
    ANSWERED = "answered"  # a probe came back
    INTERRUPTED = "interrupted"  # ranks were lost or come in, and whole groups are there to go on
    REGROUPED = "regrouped"  # they go on
    LOST = "lost"  # a rank died, hangs or does not answer, and nobody can go on
    CLEARED = "cleared"  # nothing is left of the old ranks
    REFUSED = "refused"  # a rank says why it can never work
    DRAIN = "drain"
    STOP = "stop"


_FORMING = (EngineState.PLACING, EngineState.JOINING, EngineState.LOADING, EngineState.PROBING)

TRANSITIONS: dict[tuple[EngineState, EngineEvent], EngineState] = {
    (EngineState.CLAIMING, EngineEvent.CLAIMED): EngineState.PLACING,
    (EngineState.PLACING, EngineEvent.PLACED): EngineState.JOINING,
    (EngineState.PLACING, EngineEvent.ADOPTED): EngineState.PROBING,
    (EngineState.JOINING, EngineEvent.JOINED): EngineState.LOADING,
    (EngineState.LOADING, EngineEvent.LOADED): EngineState.PROBING,
    (EngineState.PROBING, EngineEvent.ANSWERED): EngineState.READY,
    (EngineState.READY, EngineEvent.ANSWERED): EngineState.READY,
    (EngineState.PLACING, EngineEvent.INTERRUPTED): EngineState.REGROUPING,
    (EngineState.PROBING, EngineEvent.INTERRUPTED): EngineState.REGROUPING,
    (EngineState.READY, EngineEvent.INTERRUPTED): EngineState.REGROUPING,
    (EngineState.REGROUPING, EngineEvent.REGROUPED): EngineState.READY,
    (EngineState.REGROUPING, EngineEvent.LOST): EngineState.RESTARTING,
    (EngineState.READY, EngineEvent.LOST): EngineState.RESTARTING,
    (EngineState.RESTARTING, EngineEvent.LOST): EngineState.RESTARTING,
    (EngineState.RESTARTING, EngineEvent.CLEARED): EngineState.PLACING,
    (EngineState.READY, EngineEvent.DRAIN): EngineState.DRAINING,
    (EngineState.DRAINING, EngineEvent.LOST): EngineState.DRAINING,
    (EngineState.DRAINING, EngineEvent.INTERRUPTED): EngineState.DRAINING,
    (EngineState.DRAINING, EngineEvent.REGROUPED): EngineState.DRAINING,
}
TRANSITIONS |= {(state, EngineEvent.LOST): EngineState.RESTARTING for state in _FORMING}
TRANSITIONS |= {(state, EngineEvent.REFUSED): EngineState.FAILED for state in _FORMING}
TRANSITIONS |= {(state, EngineEvent.STOP): EngineState.STOPPED for state in EngineState}


def after(state: EngineState, event: EngineEvent) -> EngineState:
    """Where `event` leads from `state`; an event that cannot happen there is a defect of ours."""
    assert (state, event) in TRANSITIONS, f"{event} in state {state}"
    return TRANSITIONS[state, event]
