"""`shoal models`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.cli.failure import fail
from cluster.config.environment import cache_folder
from cluster.models import catalog, registry
from cluster.models.errors import ModelError
from workers.model.config import SUPPORTED

__all__ = ["PullProgress", "pull", "show"]


class PullProgress:
    """Bars on standard error, one a phase."""

    def __init__(self, name: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._name = name
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._task: TaskID | None = None

    def __enter__(self) -> PullProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bars.stop()

    def begin(self, phase: str) -> None:
        self._bars.start()
        self._task = self._bars.add_task(f"{phase} {self._name}", total=None)

    def update(self, done: int, whole: int) -> None:
        assert self._task is not None
        self._bars.update(self._task, completed=done, total=whole)


def show(models_dir: Path | None) -> None:
    """Prints the table of short names."""
    folder = models_dir or cache_folder()
    table = Table("name", "size", "architecture", "served", "here", "from", box=None)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for model in registry.MODELS.values():
        served = "yes" if model.architecture in SUPPORTED else "slowly"
        source = model.repo_id or "package index"
        table.add_row(model.name, model.parameters, model.architecture, served, _here(model.name, folder), source)
    console = Console()
    console.print(table)
    console.print(f"Models are kept in {folder}", style="dim", highlight=False, soft_wrap=True)


def pull(name: str, models_dir: Path | None) -> None:
    """Fetches a model and prints its folder."""
    try:
        with PullProgress(name) as progress:
            folder = catalog.pull(name, models_dir or cache_folder(), progress)
    except ModelError as error:
        fail(error)
    print(folder)


def _here(name: str, models_dir: Path) -> str:
    try:
        return "yes" if catalog.pulled_folder(name, models_dir) else ""
    except ModelError:
        return "damaged"
