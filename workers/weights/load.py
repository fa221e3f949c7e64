"""Reads a rank's share of a checkpoint: exactly the bytes of its slices, several files' worth at a time.

A reader hands out one parameter after the other and keeps none, so a model that packs or moves each as it comes
never holds more than its share and one parameter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from workers.model.sharding import Parameter, Piece
from workers.weights.index import ITEM_SIZES, CheckpointError, TensorEntry, read_index

__all__ = ["Progress", "WeightReader"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some rows of a piece and where they go."""

    entry: TensorEntry
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    target: torch.Tensor


class WeightReader:
    """The parameters of one rank, read from `folder` and converted to `dtype`.

    Opening it checks every tensor's name, dtype and shape against the headers, so that a bad checkpoint is refused
    (CheckpointError) before anything is read. Use it as a context manager: it holds files and threads.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, Parameter],
        dtype: torch.dtype,
        *,
        progress: Progress | None = None,
        num_threads: int = 4,
    ) -> None:
        self._index = read_index(folder)
        self._parameters = parameters
        self._dtype = dtype
        self._progress = progress
        for parameter in parameters.values():
            for piece in parameter.pieces:
                _check(folder, self._index, piece)
        self.bytes_total = sum(self._piece_bytes(piece) for p in parameters.values() for piece in p.pieces)
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="weights")

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def read(self, name: str) -> torch.Tensor:
        """The parameter of that name, in memory of its own."""
        parameter = self._parameters[name]
        tensor = torch.empty(parameter.shape, dtype=self._dtype)
        futures = [self._pool.submit(_read, self._file(chunk), chunk) for chunk in self._chunks(parameter, tensor)]
        for future in as_completed(futures):
            self.bytes_read += future.result()
            if self._progress is not None:
                self._progress(self.bytes_read, self.bytes_total)
        return tensor

    def _chunks(self, parameter: Parameter, tensor: torch.Tensor) -> Iterator[_Chunk]:
        filled = 0
        for piece in parameter.pieces:
            if not piece.num_rows:
                continue
            step = max(1, _CHUNK_BYTES * piece.num_rows // max(1, self._piece_bytes(piece)))
            for start in range(piece.rows[0], piece.rows[1], step):
                stop = min(start + step, piece.rows[1])
                target = tensor[filled : filled + stop - start]
                yield _Chunk(self._index[piece.name], (start, stop), piece.columns, target)
                filled += stop - start
        tensor[filled:].zero_()

    def _piece_bytes(self, piece: Piece) -> int:
        width = 1 if piece.columns is None else piece.columns[1] - piece.columns[0]
        return piece.num_rows * width * ITEM_SIZES[self._index[piece.name].dtype]

    def _file(self, chunk: _Chunk) -> int:
        path = chunk.entry.path
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]


def _check(folder: Path, index: Mapping[str, TensorEntry], piece: Piece) -> None:
    entry = index.get(piece.name)
    if entry is None:
        raise CheckpointError(f"{folder} lacks the tensor {piece.name} that its config.json calls for")
    if entry.dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{piece.name} is stored as {entry.dtype}, which is not supported; supported: {', '.join(ITEM_SIZES)}"
        )
    if entry.shape != piece.shape:
        raise CheckpointError(
            f"{piece.name} has shape {list(entry.shape)} where config.json calls for {list(piece.shape)}"
        )


@torch.inference_mode()
def _read(file: int, chunk: _Chunk) -> int:
    """Fills the chunk's target and returns how many bytes were read."""
    source_dtype = _DTYPES[chunk.entry.dtype]
    target = chunk.target
    raw = target if target.dtype == source_dtype else torch.empty(target.shape, dtype=source_dtype)
    memory = raw.view(-1).view(torch.uint8).numpy().data
    for offset, part in _spans(chunk, memory):
        _read_exactly(file, offset, part, chunk.entry.path)
    if raw is not target:
        target.copy_(raw)
    return len(memory)


def _spans(chunk: _Chunk, memory: memoryview) -> Iterator[tuple[int, memoryview]]:
    """File offsets and the memory they fill: one span for whole rows, one a row for part of the columns."""
    entry = chunk.entry
    item_size = ITEM_SIZES[entry.dtype]
    width = entry.shape[1] if chunk.columns is not None else 1
    first, last = chunk.columns or (0, 1)
    if last - first == width:
        yield entry.offset + chunk.rows[0] * width * item_size, memory
        return
    row_bytes = (last - first) * item_size
    for number, row in enumerate(range(*chunk.rows)):
        offset = entry.offset + (row * width + first) * item_size
        yield offset, memory[number * row_bytes : (number + 1) * row_bytes]


def _read_exactly(file: int, offset: int, memory: memoryview, path: Path) -> None:
    while memory:
        count = os.preadv(file, [memory], offset)
        if count == 0:
            raise CheckpointError(f"{path} is truncated: it ended while being read; fetch the model again")
        memory, offset = memory[count:], offset + count
