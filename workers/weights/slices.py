"""Reads rectangles of a checkpoint's tensors from their files, and no byte beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.weights.index import ITEM_SIZES, CheckpointError, TensorEntry

__all__ = ["Slice", "read_slice"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a tensor, counted over all its dimensions but the last, and of these some columns.

    `columns` None: the tensor is a vector, and its elements are the rows.
    """

    entry: TensorEntry
    rows: tuple[int, int]
    columns: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        num_rows = self.rows[1] - self.rows[0]
        return (num_rows,) if self.columns is None else (num_rows, self.columns[1] - self.columns[0])

    @property
    def size_bytes(self) -> int:
        num_rows, *width = self.shape
        return num_rows * (width[0] if width else 1) * ITEM_SIZES[self.entry.dtype]


def read_slice(file: int, wanted: Slice, dtype: torch.dtype, into: torch.Tensor | None = None) -> torch.Tensor:
    """The slice as it is stored, which is as `dtype`; in `into` where that is contiguous memory of its kind."""
    raw = torch.empty(wanted.shape, dtype=dtype) if into is None else into
    memory = raw.view(-1).view(torch.uint8).numpy().data
    for offset, part in _spans(wanted, memory):
        _read_exactly(file, offset, part, wanted.entry.path)
    return raw


def _spans(wanted: Slice, memory: memoryview) -> Iterator[tuple[int, memoryview]]:
    """File offsets and the memory they fill: one span for whole rows, one a row for part of the columns."""
    entry = wanted.entry
    item_size = ITEM_SIZES[entry.dtype]
    width = entry.shape[-1] if wanted.columns is not None else 1
    first, last = wanted.columns or (0, 1)
    if last - first == width:
        yield entry.offset + wanted.rows[0] * width * item_size, memory
        return
    row_bytes = (last - first) * item_size
    for number, row in enumerate(range(*wanted.rows)):
        offset = entry.offset + (row * width + first) * item_size
        yield offset, memory[number * row_bytes : (number + 1) * row_bytes]


def _read_exactly(file: int, offset: int, memory: memoryview, path: Path) -> None:
    while memory:
        count = os.preadv(file, [memory], offset)
        if count == 0:
            raise CheckpointError(f"{path} is truncated: it ended while being read; fetch the model again")
        memory, offset = memory[count:], offset + count
