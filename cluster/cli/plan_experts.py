"""`shoal plan-experts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.cli.failure import fail
from scheduler.experts_replay import Outcome, compare, read_recording

__all__ = ["show"]


def show(folder: Path, *, ranks: int, redundant: int, hosts: int, train: float) -> None:
    """Prints what each placement would have made of the recording in `folder`."""
    try:
        recording = read_recording(folder)
        outcomes = compare(recording, ranks, redundant=redundant, num_hosts=hosts, train_share=train)
    except ValueError as error:
        fail(str(error))
    console = Console(highlight=False)
    console.print(
        f"{recording.num_choices} expert choices in {len(recording.layers)} layers; placed by the first {train:.0%}, "
        "judged on the rest"
    )
    console.print(_table(outcomes))


def _table(outcomes: tuple[Outcome, ...]) -> Table:
    by_stage = "; by stage" if len(outcomes[0].carried) > 1 else ""
    table = Table("placement", "imbalance (1 is even)", f"ranks' loads, % of the mean{by_stage}", box=None)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for outcome in outcomes:
        table.add_row(outcome.name, f"{outcome.imbalance:.3f}", " | ".join(map(_parts_of_the_mean, outcome.carried)))
    return table


def _parts_of_the_mean(carried: Sequence[float]) -> str:
    mean = sum(carried) / len(carried) or 1.0
    return " ".join(f"{one / mean:.0%}" for one in carried)
