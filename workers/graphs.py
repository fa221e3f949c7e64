"""Decode steps recorded once for each padded batch size and replayed: CUDA graphs. Not run on a GPU.

A decode step launches hundreds of small kernels, and launching them takes longer than running them. A recording has
fixed shapes and buffers, so a step's numbers are copied into the buffers of the next larger size; the rows behind them
repeat the first one, which writes the same keys and values to the same place again. `Capture` is the seam: all but the
recording itself can be checked on any device by a capture that runs the function again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from workers.step import DecodeGroup, StepTensors

__all__ = ["Capture", "CudaCapture", "DecodeGraphs", "Recording", "batch_sizes"]

Run = Callable[[StepTensors], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Recording:
    """`output` holds what `replay` computed last."""

    output: torch.Tensor | None
    replay: Callable[[], None]


class Capture(Protocol):
    def __call__(self, run: Callable[[], torch.Tensor | None]) -> Recording:
        """Records one call of `run`, which reads and writes the same memory at every replay."""
        ...


class CudaCapture:
    """Recordings share their scratch memory: one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], torch.Tensor | None]) -> Recording:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up at the first call, which cannot be recorded
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's watch among them, may ask things of the device meanwhile that a recording forbids.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self._pool = self._pool or graph.pool()
        return Recording(output, graph.replay)


class DecodeGraphs:
    """`run` is the forward pass of a step whose model takes ragged steps, with the cache that its slots are in.

    Every rank of a tensor axis must make and use its own in the same order.
    """

    def __init__(
        self,
        run: Run,
        capture: Capture,
        *,
        max_batch_size: int,
        blocks_per_sequence: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._sizes = batch_sizes(max_batch_size)
        self._recorded: dict[int, tuple[StepTensors, Recording]] = {}
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            step = _static_step(size, blocks_per_sequence, block_size, device)
            self._recorded[size] = step, capture(partial(run, step))

    def covers(self, step: StepTensors) -> bool:
        """Whether the step is decoding and nothing else."""
        return not step.prefill and len(step.token_ids) <= self._sizes[-1]

    def run(self, step: StepTensors) -> torch.Tensor | None:
        """What the forward pass would give of a step that is covered."""
        rows = len(step.token_ids)
        static, recording = self._recorded[next(size for size in self._sizes if size >= rows)]
        _load(static, step)
        recording.replay()
        output = recording.output
        if output is None:
            return None
        return output[:rows].clone() if step.logit_rows is None else output.index_select(0, step.logit_rows)


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, and every eighth, up to `largest`: padding costs at most seven rows."""
    return sorted({size for size in (1, 2, 4, *range(8, largest, 8)) if size < largest} | {largest})


def _static_step(size: int, blocks_per_sequence: int, block_size: int, device: torch.device) -> StepTensors:
    """Sequences of one token each, all in the cache's first slot."""

    def zeros(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, device=device)

    blocks, lengths = zeros(size * blocks_per_sequence), torch.ones_like(zeros(size))
    group = DecodeGroup(0, size, blocks, lengths, blocks_per_sequence * block_size, None)
    return StepTensors(zeros(size), zeros(size), zeros(size), (group,), (), None)


def _load(static: StepTensors, step: StepTensors) -> None:
    """Copies a step's numbers into the buffers, and its first row's into the rows behind them."""
    (ours,), (theirs,) = static.decode, step.decode
    size, rows = ours.stop, theirs.stop
    tables = ours.block_ids.view(size, -1), theirs.block_ids.view(rows, -1)
    pairs = [
        (static.token_ids, step.token_ids),
        (static.positions, step.positions),
        (static.slots, step.slots),
        (ours.lengths, theirs.lengths),
        (tables[0][:, : tables[1].shape[1]], tables[1]),
    ]
    for buffer, values in pairs:
        buffer[:rows] = values
        if rows < size:
            buffer[rows:] = values[0]
