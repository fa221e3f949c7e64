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
from threading import Lock
from types import TracebackType

import torch

from workers.model.parameters import Parameter, Piece
from workers.model.quantization import BlockQuantization
from workers.weights.fp8 import SCALE_SUFFIX, decode_scales, dequantize_rows_, scale_shape, scale_span
from workers.weights.index import CheckpointError, TensorEntry, read_index
from workers.weights.slices import Slice, read_slice

__all__ = ["Progress", "WeightReader"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_FP8 = "F8_E4M3"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The fp32 scales of an FP8 tensor's rows from `first` on."""

    form: BlockQuantization
    scales: torch.Tensor
    first: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a piece and where it goes."""

    source: Slice
    target: torch.Tensor
    blocks: _Blocks | None


class WeightReader:
    """The parameters of one rank, read from `folder` and converted to `dtype`.

    `index` is that of the folder, where the caller has it; `quantization` what its config.json says of FP8 tensors.
    Opening it checks every tensor's name, dtype and shape against the headers, so that a bad checkpoint is refused
    (CheckpointError) before anything is read. Use it as a context manager: it holds files and threads.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, Parameter],
        dtype: torch.dtype,
        *,
        index: Mapping[str, TensorEntry] | None = None,
        quantization: BlockQuantization | None = None,
        progress: Progress | None = None,
        num_threads: int = 4,
    ) -> None:
        self._index = read_index(folder) if index is None else index
        self._parameters = parameters
        self._dtype = dtype
        self._quantization = quantization
        self._progress = progress
        pieces = [piece for parameter in parameters.values() for piece in parameter.pieces]
        for piece in pieces:
            _check(folder, self._index, piece, quantization)
        self.bytes_total = sum(self._slice(piece).size_bytes + self._scale_bytes(piece) for piece in pieces)
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._opening = Lock()
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
        tensor = torch.empty(parameter.shape, dtype=torch.float32 if parameter.full_precision else self._dtype)
        futures = [self._pool.submit(self._read, chunk) for chunk in self._chunks(parameter, tensor)]
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
            whole, blocks = self._slice(piece), self._blocks(piece)
            step = max(1, _CHUNK_BYTES * piece.num_rows // max(1, whole.size_bytes))
            for start in range(piece.rows[0], piece.rows[1], step):
                stop = min(start + step, piece.rows[1])
                target = tensor[filled : filled + stop - start]
                yield _Chunk(Slice(whole.entry, (start, stop), piece.columns), target, blocks)
                filled += stop - start
        tensor[filled:].zero_()

    def _slice(self, piece: Piece) -> Slice:
        return Slice(self._index[piece.name], piece.rows, piece.columns)

    def _scales(self, piece: Piece) -> Slice | None:
        """The scales of an FP8 piece: whole rows, for they are few. None for other types."""
        entry = self._index[piece.name]
        if entry.dtype != _FP8 or not piece.num_rows:
            return None
        assert self._quantization is not None
        scales = self._index[piece.name + SCALE_SUFFIX]
        rows = scale_span(entry.shape, self._quantization, piece.rows)
        return Slice(scales, rows, (0, scales.shape[-1]))

    def _scale_bytes(self, piece: Piece) -> int:
        scales = self._scales(piece)
        return 0 if scales is None else scales.size_bytes

    def _blocks(self, piece: Piece) -> _Blocks | None:
        scales = self._scales(piece)
        if scales is None:
            return None
        assert self._quantization is not None
        raw = read_slice(self._file(scales.entry.path), scales, _SCALE_DTYPES[scales.entry.dtype])
        self.bytes_read += scales.size_bytes
        return _Blocks(self._quantization, decode_scales(raw), scales.rows[0])

    @torch.inference_mode()
    def _read(self, chunk: _Chunk) -> int:
        """Fills the chunk's target and returns how many bytes were read."""
        source, target = chunk.source, chunk.target
        file = self._file(source.entry.path)
        if chunk.blocks is not None:
            _dequantize(read_slice(file, source, torch.uint8), chunk)
        elif _DTYPES[source.entry.dtype] == target.dtype:
            read_slice(file, source, target.dtype, target)
        else:
            target.copy_(read_slice(file, source, _DTYPES[source.entry.dtype]))
        return source.size_bytes

    def _file(self, path: Path) -> int:
        with self._opening:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[path]


def _dequantize(raw: torch.Tensor, chunk: _Chunk) -> None:
    source, blocks = chunk.source, chunk.blocks
    assert blocks is not None
    assert source.columns is not None
    span = scale_span(source.entry.shape, blocks.form, source.rows)
    dequantize_rows_(
        raw,
        blocks.scales[span[0] - blocks.first : span[1] - blocks.first],
        chunk.target,
        shape=source.entry.shape,
        block=blocks.form,
        rows=source.rows,
        columns=source.columns,
    )


def _check(
    folder: Path, index: Mapping[str, TensorEntry], piece: Piece, quantization: BlockQuantization | None
) -> None:
    entry = index.get(piece.name)
    if entry is None:
        raise CheckpointError(f"{folder} lacks the tensor {piece.name} that its config.json calls for")
    if entry.dtype not in _DTYPES and entry.dtype != _FP8:
        supported = ", ".join((*_DTYPES, _FP8))
        raise CheckpointError(
            f"{piece.name} is stored as {entry.dtype}, which is not supported; supported: {supported}"
        )
    if entry.shape != piece.shape:
        raise CheckpointError(
            f"{piece.name} has shape {list(entry.shape)} where config.json calls for {list(piece.shape)}"
        )
    if entry.dtype == _FP8:
        _check_scales(index, piece, quantization)


def _check_scales(index: Mapping[str, TensorEntry], piece: Piece, quantization: BlockQuantization | None) -> None:
    if quantization is None or piece.columns is None:
        raise CheckpointError(
            f"{piece.name} is stored as {_FP8}, of which config.json's quantization_config says nothing"
        )
    scales = index.get(piece.name + SCALE_SUFFIX)
    if scales is None:
        raise CheckpointError(f"{piece.name} is stored as {_FP8} without its scales, {piece.name + SCALE_SUFFIX}")
    expected = scale_shape(piece.shape, quantization)
    if scales.shape != expected or scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{piece.name + SCALE_SUFFIX} is {scales.dtype} {list(scales.shape)} where {list(expected)} of "
            f"{', '.join(_SCALE_DTYPES)} are called for"
        )
