"""The table of an engine's life, pair by pair."""

from __future__ import annotations

import itertools

import pytest

from cluster.engine.states import TRANSITIONS, EngineEvent, EngineState, after

S, E = EngineState, EngineEvent
FORMING = (S.PLACING, S.JOINING, S.LOADING, S.PROBING)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(S, E)))
def test_every_pair(state: EngineState, event: EngineEvent) -> None:
    if (state, event) in TRANSITIONS:
        assert after(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(AssertionError, match=f"{event} in state {state}"):
            after(state, event)


def test_the_way_to_ready() -> None:
    state = S.CLAIMING
    for event in (E.CLAIMED, E.PLACED, E.JOINED, E.LOADED, E.ANSWERED, E.ANSWERED):
        state = after(state, event)
    assert state is S.READY
    assert after(after(S.PLACING, E.ADOPTED), E.ANSWERED) is S.READY


@pytest.mark.parametrize("state", [*FORMING, S.READY])
def test_a_loss_always_leads_back_to_placing(state: EngineState) -> None:
    assert after(after(state, E.LOST), E.CLEARED) is S.PLACING


def test_nothing_wedges() -> None:
    """From every state there is a way to STOPPED, and from every living one a way to READY or to FAILED."""
    for state in S:
        assert after(state, E.STOP) is S.STOPPED
    living = set(S) - {S.FAILED, S.STOPPED, S.DRAINING}
    reaches = {S.READY}
    while True:
        more = {state for (state, _), target in TRANSITIONS.items() if target in reaches}
        if more <= reaches:
            break
        reaches |= more
    assert living <= reaches


def test_only_what_is_being_formed_can_be_refused() -> None:
    assert {state for state, event in TRANSITIONS if event is E.REFUSED} == set(FORMING)
    assert not [pair for pair in TRANSITIONS if pair[0] is S.FAILED and pair[1] is not E.STOP]
