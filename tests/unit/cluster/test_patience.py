"""How long a start may take, with a clock of the test's own."""

from __future__ import annotations

from cluster.app.patience import Patience
from cluster.engine.states import EngineState


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_patience_ends_where_nothing_happens() -> None:
    clock = Clock()
    patience = Patience(10.0, clock)
    clock.now_s = 9.0
    assert not patience.ends([EngineState.PLACING])
    clock.now_s = 11.0
    assert patience.ends([EngineState.PLACING])


def test_no_engine_at_all_is_waiting_too() -> None:
    clock = Clock()
    patience = Patience(10.0, clock)
    clock.now_s = 10.5
    assert patience.ends([])


def test_loading_takes_what_it_takes() -> None:
    clock = Clock()
    patience = Patience(10.0, clock)
    clock.now_s = 6.0
    assert not patience.ends([EngineState.JOINING])
    for clock.now_s in (100.0, 1000.0):
        assert not patience.ends([EngineState.LOADING, EngineState.PLACING])
    clock.now_s = 1003.0
    assert not patience.ends([EngineState.RESTARTING])
    clock.now_s = 1005.0
    assert patience.ends([EngineState.PLACING]), "starting over does not start the count over"
