"""What each step held and how long it took, as JSON lines: what `scheduler.simulator` is fitted to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TextIO

from scheduler.plan import StepPlan
from scheduler.simulator.step_time import StepTime

__all__ = ["StepLog"]

log = logging.getLogger(__name__)

_FLUSH_STEPS = 64


class StepLog:
    """Appends to `folder`/`name`.jsonl, buffered. A disk that fails ends the recording, never a step.

    A line is `[step, features, seconds]`, where seconds are those of a whole turn of the loop: planning, the step,
    and handing out its tokens.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = (folder / f"{name}.jsonl").open("a", encoding="utf-8")
        self._num_unwritten = 0

    def record(self, plan: StepPlan, seconds: float) -> None:
        if self._file is None:
            return
        line = json.dumps([plan.step, StepTime.features(plan), round(seconds, 7)])
        try:
            self._file.write(line + "\n")
            self._num_unwritten += 1
            if self._num_unwritten >= _FLUSH_STEPS:
                self._file.flush()
                self._num_unwritten = 0
        except OSError as error:
            log.warning("steps are no longer recorded: %s", error)
            self._file = None

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
