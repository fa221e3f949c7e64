"""Ranks and steps for tests of the model: an in-memory tensor axis, runners on it, and steps without a batcher."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from workers.assemble import assemble
from workers.inputs import StepInputs
from workers.parallel.collectives import Collectives, SingleRank
from workers.parallel.plan import ParallelPlan
from workers.runner import Runner
from workers.settings import EngineSettings

__all__ = ["Ranks", "Sequence_", "memory_axis", "settings_for", "step_of"]

R = TypeVar("R")
T = TypeVar("T")


class MemoryCollectives:
    """One rank of an axis whose ranks are threads of this process."""

    kind = "memory"

    def __init__(self, index: int, barrier: threading.Barrier, board: list[torch.Tensor]) -> None:
        self.index = index
        self.size = barrier.parties
        self._barrier = barrier
        self._board = board

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._board[self.index] = x
        self._barrier.wait(timeout=60)
        seen = list(self._board)
        self._barrier.wait(timeout=60)
        return seen

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(dim=0)

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        seen = self._exchange(x)
        assert len({part.shape for part in seen}) == 1
        return torch.cat(seen, dim=-1) if self.index == 0 else None

    def minimum(self, value: int) -> int:
        return int(torch.stack(self._exchange(torch.tensor(value))).min())


def memory_axis(size: int) -> list[Collectives]:
    if size == 1:
        return [SingleRank()]
    barrier = threading.Barrier(size)
    board = [torch.empty(0)] * size
    return [MemoryCollectives(index, barrier, board) for index in range(size)]


def settings_for(folder: Path, **changes: object) -> EngineSettings:
    values: dict[str, object] = {
        "engine": "engine-0",
        "model_name": "tiny",
        "model_path": str(folder),
        "plan": ParallelPlan(),
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "max_batch_size": 8,
        "block_size": 4,
    }
    return EngineSettings(**(values | changes))  # type: ignore[arg-type]


class Ranks:
    """All ranks of one engine's tensor axis, run in lockstep."""

    def __init__(self, folder: Path, *, tensor: int = 1, **changes: object) -> None:
        self._pool = ThreadPoolExecutor(tensor)
        axis = memory_axis(tensor)
        settings = settings_for(folder, plan=ParallelPlan(tensor=tensor), **changes)
        self.runners: list[Runner] = self._all(
            axis, lambda collectives: assemble(settings, settings.plan.place(collectives.index), collectives)
        )

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        first, *others = self._all(self.runners, lambda runner: runner.forward(inputs))
        assert first is not None
        assert all(other is None for other in others)
        return first

    def close(self) -> None:
        self._pool.shutdown()

    def _all(self, ranks: Sequence[R], act: Callable[[R], T]) -> list[T]:
        return list(self._pool.map(act, ranks))


@dataclass
class Sequence_:
    """A sequence and how far it has been run."""

    token_ids: list[int]
    block_ids: list[int]
    num_computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


def step_of(parts: Sequence[tuple[Sequence_, int, int]]) -> StepInputs:
    """A step that runs, of each sequence, its next so many tokens with logits for the last so many."""

    def ints(values: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array(values, dtype=np.int64)

    return StepInputs(
        generation=1,
        step=1,
        token_ids=ints([t for s, n, _ in parts for t in s.token_ids[s.num_computed : s.num_computed + n]]),
        num_tokens=ints([n for _, n, _ in parts]),
        num_computed=ints([s.num_computed for s, _, _ in parts]),
        block_ids=ints([b for s, _, _ in parts for b in s.block_ids]),
        num_blocks=ints([len(s.block_ids) for s, _, _ in parts]),
        num_logits=ints([r for _, _, r in parts]),
    )
