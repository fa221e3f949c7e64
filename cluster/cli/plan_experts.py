"""`shoal plan-experts`."""

from __future__ import annotations

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
    table = Table("placement", "imbalance (1 is even)", "ranks' loads, % of the mean", box=None)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for outcome in outcomes:
        mean = sum(outcome.carried) / len(outcome.carried) or 1.0
        loads = " ".join(f"{carried / mean:.0%}" for carried in outcome.carried)
        table.add_row(outcome.name, f"{outcome.imbalance:.3f}", loads)
    return table
