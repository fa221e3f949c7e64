"""Traces of load, and how many engines there are behind them."""

from __future__ import annotations

from itertools import pairwise

from scheduler.autoscale import Autoscaler, AutoscaleSettings, EngineLoads

SETTINGS = AutoscaleSettings(least=1, most=4, up_after_s=10, down_after_s=60, pause_s=20)


def _run(trace: list[tuple[int, float]], *, engines: int = 1, start_s: int = 5) -> list[int]:
    """Waiting sequences and cache use of the whole cluster, a second each; the engines there are after each."""
    scaler = Autoscaler(SETTINGS)
    coming: list[int] = []
    history = []
    for now_s, (num_waiting, cache_use) in enumerate(trace):
        ready = engines - len(coming)
        loads = EngineLoads(ready, len(coming), num_waiting, 8, int(cache_use * 100 * ready), 100 * ready)
        wanted = scaler.wanted(float(now_s), loads)
        if wanted > engines:
            coming += [now_s + start_s] * (wanted - engines)
        engines = wanted
        coming = [at_s for at_s in coming if at_s > now_s]
        history.append(engines)
    return history


def test_a_lasting_queue_brings_engines_one_after_the_other() -> None:
    history = _run([(50, 0.5)] * 120)
    assert history[9] == 1, "not at once"
    assert history[10] == 2
    assert history[-1] == 4
    steps = [after - before for before, after in pairwise(history)]
    assert set(steps) <= {0, 1}


def test_a_short_queue_brings_none() -> None:
    assert set(_run(([(50, 0.5)] * 8 + [(0, 0.5)]) * 20)) == {1}


def test_a_full_cache_brings_engines_without_a_queue() -> None:
    assert _run([(0, 0.95)] * 60)[-1] > 1


def test_idle_engines_go_slowly_down_to_the_least() -> None:
    history = _run([(0, 0.01)] * 400, engines=4)
    assert history[59] == 4
    assert history[60] == 3
    assert history[-1] == 1


def test_between_the_thresholds_nothing_moves() -> None:
    assert set(_run([(0, 0.5), (1, 0.6)] * 300, engines=2)) == {2}


def test_what_fewer_engines_would_not_hold_stays() -> None:
    assert set(_run([(0, 0.3)] * 300, engines=2)) == {2}, "one would use 60 %"
    assert _run([(0, 0.15)] * 300, engines=2)[-1] == 1


def test_the_bounds_hold_whatever_was_there_before() -> None:
    assert _run([(0, 0.5)], engines=9) == [4]
    scaler = Autoscaler(AutoscaleSettings(least=2))
    assert scaler.wanted(0.0, EngineLoads(1, 0, 0, 0, 0, 100)) == 2
