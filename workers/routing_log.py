"""Writes every expert choice to files, to try placements on (`scheduler/experts_replay.py`).

Each file holds a thousand tokens or a few more, or what came in two seconds: `experts` [layers, tokens, choices],
`layers`, and `num_experts`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.parallel.dispatch import Routing

__all__ = ["RoutingLog"]

log = logging.getLogger(__name__)

_TOKENS_PER_FILE = 1024
# What is not in a file yet is lost with a rank that is killed: so nothing waits longer than this for more.
_WRITE_EVERY_S = 2.0


class RoutingLog:
    """A `RoutingRecorder` into `folder`, whose files sort by time and end with `name`. A thread of its own writes them.

    What cannot be written is said in the log and ends the recording, not the serving.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        generation: int,
        layers: Sequence[int],
        num_experts: int,
        tokens_per_file: int = _TOKENS_PER_FILE,
        write_every_s: float = _WRITE_EVERY_S,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = name
        self._generation = generation
        self._layers = tuple(layers)
        self._num_experts = num_experts
        self._tokens_per_file = tokens_per_file
        self._write_every_s = write_every_s
        self._step: list[NDArray[np.uint16]] = []
        self._lock = threading.Lock()
        self._steps: list[NDArray[np.uint16]] = []
        self._num_tokens = 0
        self._files: queue.SimpleQueue[NDArray[np.uint16] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="routing-log", daemon=True)
        self._thread.start()

    def record(self, layer: int, routing: Routing) -> None:
        if layer == self._layers[0]:
            self._step = []
        self._step.append(routing.expert_ids.cpu().numpy().astype(np.uint16))
        # A step that was under way when the recording began is not complete, and not kept.
        if layer != self._layers[-1] or len(self._step) < len(self._layers):
            return
        with self._lock:
            self._steps.append(np.stack(self._step))
            self._num_tokens += len(routing.expert_ids)
            if self._num_tokens >= self._tokens_per_file:
                self._flush()

    def close(self) -> None:
        """Writes what is left. To be called once the model has no recorder any more."""
        with self._lock:
            self._flush()
        self._files.put(None)
        self._thread.join()

    def _flush(self) -> None:
        if self._steps:
            self._files.put(np.concatenate(self._steps, axis=1))
            self._steps, self._num_tokens = [], 0

    def _write(self) -> None:
        number = 0
        broken = False
        while (experts := self._next()) is not None:
            if broken:
                continue
            path = self._folder / f"{self._generation:05d}-{number:06d}-{self._name}.npz"
            try:
                self._save(path, experts)
            except OSError as error:
                log.error("routing is no longer recorded: %s", error)
                broken = True
            number += 1

    def _next(self) -> NDArray[np.uint16] | None:
        """What is to be written next; None at the end."""
        while True:
            try:
                return self._files.get(timeout=self._write_every_s)
            except queue.Empty:
                with self._lock:
                    self._flush()

    def _save(self, path: Path, experts: NDArray[np.uint16]) -> None:
        """Under its name only once it is whole: a rank may be killed in the midst of it."""
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, experts=experts, layers=self._layers, num_experts=self._num_experts)
        unfinished.rename(path)
