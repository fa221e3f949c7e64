"""What a comparison says: values taken turn by turn in one run, their medians, and the ratio."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["Figure", "Findings", "begin", "deliver", "progress"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One thing measured, ours and (where there is one) the peer's, in the order of the rounds.

    With a peer the goal is a least ratio of medians, ours over the peer's; without one it is a most or a least
    median, as `goal_is_most` says. No goal: the figure is only told.
    """

    what: str
    unit: str
    ours: tuple[float, ...]
    peers: tuple[float, ...] = ()
    goal: float | None = None
    goal_is_most: bool = False

    def __post_init__(self) -> None:
        if not self.ours:
            raise ValueError(f"{self.what}: nothing was measured")
        if self.peers and len(self.peers) != len(self.ours):
            raise ValueError(f"{self.what}: {len(self.ours)} rounds of ours, {len(self.peers)} of the peer's")

    @property
    def ratio(self) -> float | None:
        """Of the medians, ours over the peer's."""
        return median(self.ours) / median(self.peers) if self.peers else None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None without one."""
        if self.goal is None:
            return None
        value = median(self.ours) if self.ratio is None else self.ratio
        return value <= self.goal if self.goal_is_most else value >= self.goal

    def row(self) -> str:
        """A line of a Markdown table: what, ours, the peer's, ratio, goal."""
        goal = "-"
        if self.goal is not None:
            bound = f"{'<=' if self.goal_is_most else '>='} {self.goal:g}{'x' if self.peers else f' {self.unit}'}"
            goal = f"{bound}: {'reached' if self.reached else 'MISSED'}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}x"
        return f"| {self.what} ({self.unit}) | {_spread(self.ours)} | {_spread(self.peers)} | {ratio} | {goal} |"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g}, {len(values)} rounds)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything one comparison found, and what a reader needs to know beside it."""

    title: str
    peer: str
    figures: tuple[Figure, ...]
    facts: Mapping[str, str]

    def markdown(self) -> str:
        """Medians, with the range of the rounds behind them."""
        head = f"| | Shoal | {self.peer or '-'} | ratio | goal |\n|---|---|---|---|---|"
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        return "\n".join([f"**{self.title}**", "", head, *(figure.row() for figure in self.figures), "", facts])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Findings:
        data: dict[str, Any] = json.loads(text)
        figures = tuple(
            Figure(**(figure | {"ours": tuple(figure["ours"]), "peers": tuple(figure["peers"])}))
            for figure in data.pop("figures")
        )
        return cls(figures=figures, **data)


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line. From here on SIGTERM ends this process as an error would: what it started ends too."""
    parser.add_argument("--json", type=Path, help="write the findings here, for loadtest.figures")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return options


def progress(message: str) -> None:
    """A line for whoever waits; findings go to standard output."""
    print(message, file=sys.stderr, flush=True)


def deliver(findings: Findings, options: argparse.Namespace) -> None:
    """Prints the findings, and writes them where asked."""
    print(findings.markdown())
    if options.json:
        options.json.write_text(findings.to_json() + "\n", encoding="utf-8")
