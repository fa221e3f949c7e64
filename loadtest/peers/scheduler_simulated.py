"""What scheduling costs, and what its policies are worth against plain ones in the simulator.

    python -m loadtest.peers.scheduler_simulated

The simulator drives the real batcher with a model of step times (`python -m scheduler.simulator`); the cost is that
of the real batcher on this machine's clock. First come, round-robin and steps of any length are the plain policies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loadtest.peers.comparison import Figure, Findings, begin, deliver

__all__ = ["findings_of"]

Tables = dict[str, Any]


def findings_of(cost: Tables, tables: Tables) -> Findings:
    """From what the two commands wrote."""
    figures = [
        Figure(
            what=f"scheduling a step of {size} running sequences",
            unit="ms",
            ours=(found["plain"]["median_ms"],),
            goal=found["goal_ms"],
            goal_is_most=True,
        )
        for size, found in cost.items()
    ]
    growth = cost["1024"]["plain"]["median_ms"] / cost["64"]["plain"]["median_ms"] / (1024 / 64)
    figures += [
        Figure(what="the same of 1,024, between tenants", unit="ms", ours=(cost["1024"]["tenants"]["median_ms"],)),
        Figure(what="growth from 64 to 1,024 over that of the number", unit="1 is linear", ours=(growth,)),
    ]
    tenants, deadlines = _Table(tables["tenants"]), _Table(tables["deadlines"])
    prefixes, gaps = _Table(tables["prefixes"]), _Table(tables["gaps"])
    late = "deadline first, late refused"
    figures += [
        Figure(
            what="Jain's index, one heavy and four light tenants",
            unit="1 is fair",
            ours=(tenants.value("token counter", "Jain's index"),),
            goal=0.95,
        ),
        tenants.figure("the same, first come as the peer", "1 is fair", "token counter", "first come", "Jain's index"),
        tenants.figure("light tenants' time to first token", "s", "token counter", "first come", "light TTFT p50 s"),
        deadlines.figure("deadlines met at 1.2 times the load", "share", late, "first come", "deadlines met", goal=1.0),
        deadlines.figure("throughput at that load", "tokens/s", late, "first come", "tokens/s", goal=0.99),
        prefixes.figure("prefix hits, conversations", "share", "prefix-affinity", "round-robin", "hit rate", goal=1.0),
        prefixes.figure("their time to first token, p50", "ms", "prefix-affinity", "round-robin", "TTFT p50 ms"),
        prefixes.figure("their time to first token, p99", "ms", "prefix-affinity", "round-robin", "TTFT p99 ms"),
        gaps.figure("worst gap while 8k tokens are prefilled", "ms", "steps of 50 ms", "plain", "worst gap ms"),
        gaps.figure("that prompt's time to first token", "ms", "steps of 50 ms", "plain", "long TTFT ms"),
    ]
    return Findings(
        title="Scheduling, simulated; the peer is the plain policy",
        peer="plain",
        figures=tuple(figures),
        facts={"policies": "`python -m scheduler.simulator`", "cost": "`python -m scheduler.simulator.overhead`"},
    )


class _Table:
    """One comparison of the simulator."""

    def __init__(self, table: Tables) -> None:
        self._columns: list[str] = table["columns"]
        self._rows = {row["policy"]: row["values"] for row in table["rows"]}

    def value(self, policy: str, column: str) -> float:
        value: float = self._rows[policy][self._columns.index(column)]
        return value

    def figure(self, what: str, unit: str, ours: str, plain: str, column: str, goal: float | None = None) -> Figure:
        values = (self.value(ours, column),), (self.value(plain, column),)
        return Figure(what=what, unit=unit, ours=values[0], peers=values[1], goal=goal)


def _run(module: str, *arguments: str) -> Tables:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", module, *arguments, "--json", str(path)]
        subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603
        found: Tables = json.loads(path.read_text(encoding="utf-8"))
        return found


def main() -> int:
    options = begin(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    deliver(findings_of(_run("scheduler.simulator.overhead"), _run("scheduler.simulator")), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
