"""`shoal convert`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from cluster.cli.failure import USAGE, fail
from cluster.config.sizes import parse_size
from workers.weights.convert import Conversion, convert, verify

__all__ = ["check", "run"]


class _Bars:
    """One a phase, on standard error."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done)


def run(source: Path, target: Path, *, quantization: str, dtype: str, max_shard_size: str) -> None:
    """Converts and prints the new folder."""
    try:
        shard_bytes = parse_size(max_shard_size, "--max-shard-size")
        wanted = Conversion(quantization=quantization, dtype=dtype, max_shard_bytes=shard_bytes)
    except ValueError as error:
        fail(error, USAGE)
    try:
        with _Bars() as bars:
            convert(source, target, wanted, bars)
    except (ValueError, OSError) as error:
        fail(error)
    print(target)


def check(folder: Path) -> None:
    """Reads a converted folder against its checksums."""
    try:
        with _Bars() as bars:
            verify(folder, bars)
    except (ValueError, OSError) as error:
        fail(error)
    print(f"{folder}: every file is as it was written")
