"""When requests are sent: open-loop arrivals, which do not wait for answers.

Every model yields offsets in seconds from the start, never falling; the same seed yields the same offsets.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = [
    "Arrivals",
    "AtOnce",
    "ConstantArrivals",
    "GammaArrivals",
    "PoissonArrivals",
    "TraceArrivals",
    "parse_arrivals",
    "take",
]


class Arrivals(Protocol):
    """Offsets in seconds; endless, except for a trace."""

    def offsets_s(self) -> Iterator[float]: ...


@dataclass(frozen=True, slots=True)
class PoissonArrivals:
    """Independent arrivals at a mean rate: exponential gaps."""

    rate_per_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive("rate_per_s", self.rate_per_s)

    def offsets_s(self) -> Iterator[float]:
        rng = random.Random(self.seed)
        return _running_sum(rng.expovariate(self.rate_per_s) for _ in itertools.count())


@dataclass(frozen=True, slots=True)
class ConstantArrivals:
    """Equal gaps; the first request at once."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _check_positive("rate_per_s", self.rate_per_s)

    def offsets_s(self) -> Iterator[float]:
        return (index / self.rate_per_s for index in itertools.count())


@dataclass(frozen=True, slots=True)
class GammaArrivals:
    """Gamma-distributed gaps: coefficient of variation 1 is Poisson, above 1 comes in bursts, below is more even."""

    rate_per_s: float
    variation: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive("rate_per_s", self.rate_per_s)
        _check_positive("variation", self.variation)

    def offsets_s(self) -> Iterator[float]:
        rng = random.Random(self.seed)
        shape = 1 / self.variation**2
        scale_s = 1 / (self.rate_per_s * shape)
        return _running_sum(rng.gammavariate(shape, scale_s) for _ in itertools.count())


@dataclass(frozen=True, slots=True)
class TraceArrivals:
    """Recorded offsets, shifted so that the first is at zero."""

    recorded_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.recorded_s:
            raise ValueError("trace: no arrivals")
        if not all(math.isfinite(at) for at in self.recorded_s):
            raise ValueError("trace: an arrival is not a finite number")
        if any(later < earlier for earlier, later in itertools.pairwise(self.recorded_s)):
            raise ValueError("trace: arrivals must not go back in time")

    @classmethod
    def from_file(cls, path: Path) -> TraceArrivals:
        """One arrival in seconds per line, before the first comma; blank lines and lines with # are left out."""
        lines = (line.partition(",")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        return cls(tuple(float(line) for line in lines if line and not line.startswith("#")))

    def offsets_s(self) -> Iterator[float]:
        return (at - self.recorded_s[0] for at in self.recorded_s)


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Everything at the start."""

    def offsets_s(self) -> Iterator[float]:
        return itertools.repeat(0.0)


def take(arrivals: Arrivals, *, count: int, duration_s: float | None = None) -> list[float]:
    """At most `count` offsets, those before `duration_s` where it is given."""
    offsets = itertools.islice(arrivals.offsets_s(), count)
    return list(itertools.takewhile(lambda offset: duration_s is None or offset < duration_s, offsets))


def parse_arrivals(text: str, *, seed: int = 0) -> Arrivals:
    """Reads `poisson:RATE`, `constant:RATE`, `gamma:RATE:VARIATION`, `trace:FILE` or `at-once`."""
    kind, *rest = text.split(":")
    try:
        match kind, rest:
            case "poisson", [rate]:
                return PoissonArrivals(float(rate), seed)
            case "constant", [rate]:
                return ConstantArrivals(float(rate))
            case "gamma", [rate, variation]:
                return GammaArrivals(float(rate), float(variation), seed)
            case "trace", [_, *_]:
                return TraceArrivals.from_file(Path(":".join(rest)))
            case "at-once", []:
                return AtOnce()
    except ValueError as error:
        raise ValueError(f"arrivals {text!r}: {error}") from error
    raise ValueError(f"arrivals {text!r}: use poisson:RATE, constant:RATE, gamma:RATE:VARIATION, trace:FILE or at-once")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be above 0, not {value}")


def _running_sum(gaps_s: Iterator[float]) -> Iterator[float]:
    return itertools.accumulate(gaps_s)
