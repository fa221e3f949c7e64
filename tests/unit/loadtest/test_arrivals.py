"""Arrivals: seeded, ordered, at the rate that was asked for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev

import pytest

from loadtest.arrivals import (
    Arrivals,
    AtOnce,
    ConstantArrivals,
    GammaArrivals,
    PoissonArrivals,
    TraceArrivals,
    parse_arrivals,
    take,
)

RANDOM: list[Arrivals] = [PoissonArrivals(5.0, 1), GammaArrivals(5.0, 3.0, 1), GammaArrivals(5.0, 0.3, 1)]


def _gaps(arrivals: Arrivals, count: int = 20_000) -> list[float]:
    return [later - earlier for earlier, later in pairwise([0.0, *take(arrivals, count=count)])]


@pytest.mark.parametrize("arrivals", RANDOM)
def test_random_arrivals_keep_their_rate_and_never_go_back(arrivals: Arrivals) -> None:
    gaps = _gaps(arrivals)
    assert min(gaps) >= 0
    assert mean(gaps) == pytest.approx(0.2, rel=0.06)


@pytest.mark.parametrize(("arrivals", "variation"), list(zip(RANDOM, [1.0, 3.0, 0.3], strict=True)))
def test_gaps_vary_as_asked(arrivals: Arrivals, variation: float) -> None:
    gaps = _gaps(arrivals)
    assert pstdev(gaps) / mean(gaps) == pytest.approx(variation, rel=0.06)


@pytest.mark.parametrize("arrivals", RANDOM)
def test_the_same_seed_gives_the_same_times(arrivals: Arrivals) -> None:
    assert take(arrivals, count=50) == take(arrivals, count=50)


def test_another_seed_gives_other_times() -> None:
    assert take(PoissonArrivals(5.0, 1), count=5) != take(PoissonArrivals(5.0, 2), count=5)


def test_constant_arrivals() -> None:
    assert take(ConstantArrivals(4.0), count=3) == [0.0, 0.25, 0.5]


def test_at_once() -> None:
    assert take(AtOnce(), count=3) == [0.0, 0.0, 0.0]


def test_a_duration_ends_the_arrivals() -> None:
    assert take(ConstantArrivals(4.0), count=100, duration_s=0.5) == [0.0, 0.25]


def test_a_trace_file_starts_at_zero(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("# seconds, prompt\n100.5,12\n\n101.0,4\n101.0\n")
    assert take(TraceArrivals.from_file(file), count=9) == [0.0, 0.5, 0.5]
    assert parse_arrivals(f"trace:{file}") == TraceArrivals((100.5, 101.0, 101.0))


@pytest.mark.parametrize("recorded", [(), (2.0, 1.0), (0.0, float("nan"))])
def test_a_bad_trace_is_refused(recorded: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="trace"):
        TraceArrivals(recorded)


def test_arrivals_are_read_from_text() -> None:
    assert parse_arrivals("poisson:2.5", seed=4) == PoissonArrivals(2.5, 4)
    assert parse_arrivals("constant:2") == ConstantArrivals(2.0)
    assert parse_arrivals("gamma:2:3", seed=4) == GammaArrivals(2.0, 3.0, 4)
    assert parse_arrivals("at-once") == AtOnce()


@pytest.mark.parametrize("text", ["", "poisson", "poisson:0", "poisson:nan", "constant:-1", "gamma:1", "gamma:1:0"])
def test_bad_arrivals_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^arrivals"):
        parse_arrivals(text)
