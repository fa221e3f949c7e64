"""What the user sees of a run: lines on standard error, and a bar while weights are loaded on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from cluster.engine.states import EngineState
from cluster.roster import EngineReport

__all__ = ["Announcer"]


class Announcer:
    """Tells what changed since it was told last."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._told: dict[str, str] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        self._bars = Progress(*columns, console=self.console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def line(self, text: str) -> None:
        """One line, never wrapped: scripts read it, too."""
        self.console.print(text, soft_wrap=True, markup=False)

    def engines(self, reports: Sequence[EngineReport]) -> None:
        """Every engine that has come to another state."""
        for report in reports:
            state, generation = EngineState(report.status.state), report.status.generation
            error = report.error if state in (EngineState.RESTARTING, EngineState.FAILED) else ""
            again = f" (generation {generation})" if generation > 1 else ""
            told = f"{report.engine}: {state}{again}" + (f": {error}" if error else "")
            if self._told.get(report.engine) != told:
                self._told[report.engine] = told
                self.line(told)
            self._bar(report, loading=state is EngineState.LOADING)

    def close(self) -> None:
        """Takes the bars away."""
        if self._tasks:
            self._bars.stop()

    def _bar(self, report: EngineReport, *, loading: bool) -> None:
        if not self.console.is_terminal:
            return
        task = self._tasks.get(report.engine)
        if loading:
            self._bars.start()
            if task is None:
                task = self._tasks[report.engine] = self._bars.add_task(f"loading {report.engine}", total=1.0)
            self._bars.update(task, completed=report.progress)
        elif task is not None:
            self._bars.remove_task(self._tasks.pop(report.engine))
            if not self._tasks:
                self._bars.stop()
