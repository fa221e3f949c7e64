"""Reads a rank's share of a checkpoint: exactly the bytes of its slices, several files' worth at a time.

A reader hands out one parameter after the other and keeps none, so a model that packs or moves each as it comes
never holds more than its share and one parameter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch

from workers.kernels.quantized import Fp8Weight, Int8Weight, Weight, quantize_int8
from workers.model.parameters import Parameter, Piece
from workers.model.quantization import BlockQuantization
from workers.weights.form import Form, form_of, held_bytes
from workers.weights.index import CheckpointError, TensorEntry, read_index
from workers.weights.scales import FP8, INT8, Blocks, Channels, check_scales, read_scales, scales_of
from workers.weights.slices import Slice, read_slice

__all__ = ["Progress", "WeightReader"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    FP8: torch.uint8,  # decoded by its bits
    INT8: torch.int8,
}
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a piece and where it goes."""

    source: Slice
    target: torch.Tensor
    scales: Blocks | Channels | None  # None: as it is stored


class WeightReader:
    """The parameters of one rank, read from `folder` and converted to `dtype`.

    `index` is that of the folder, where the caller has it; `quantization` what its config.json says of FP8 tensors.
    `hold` says in which form the weights of linear layers are wanted (`form.py`).
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
        hold: str = "none",
        progress: Progress | None = None,
        num_threads: int = 4,
    ) -> None:
        self._index = read_index(folder) if index is None else index
        self._parameters = parameters
        self._dtype = dtype
        self._quantization = quantization
        self._hold = hold
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

    def read(self, name: str) -> Weight:
        """The parameter of that name, in memory of its own."""
        parameter = self._parameters[name]
        form = self._form(parameter)
        if form is Form.FP8:
            return self._read_fp8(parameter)
        if form is Form.INT8:
            return self._read_int8(parameter)
        return self._read_dense(parameter, torch.float32 if parameter.full_precision else self._dtype)

    @property
    def held_bytes(self) -> int:
        """What all parameters take in memory."""
        blocks = self._quantization
        return sum(held_bytes(each, self._form(each), self._dtype, blocks) for each in self._parameters.values())

    def _read_dense(self, parameter: Parameter, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(parameter.shape, dtype=dtype)
        self._fill(parameter, tensor, [self._scales(piece) for piece in parameter.pieces])
        return tensor

    def _read_fp8(self, parameter: Parameter) -> Fp8Weight:
        """As it is stored, but with scales for each row."""
        assert self._quantization is not None
        values = torch.empty(parameter.shape, dtype=torch.uint8)
        width, scales = self._quantization.columns, []
        for piece in parameter.pieces:
            blocks = self._scales(piece)
            if blocks is not None:
                assert isinstance(blocks, Blocks)
                scales.append(blocks.per_row(piece))
        self._fill(parameter, values, [None] * len(parameter.pieces))
        first = parameter.pieces[0].columns
        assert first is not None
        return Fp8Weight(values, torch.cat(scales), width, first[0] % width)

    def _read_int8(self, parameter: Parameter) -> Int8Weight:
        """As it is stored, where that is int8; else quantized from fp32."""
        if any(self._index[piece.name].dtype != INT8 for piece in parameter.pieces):
            return quantize_int8(self._read_dense(parameter, torch.float32))
        values, scales = torch.empty(parameter.shape, dtype=torch.int8), []
        for piece in parameter.pieces:
            channels = self._scales(piece)
            if channels is not None:
                scales.append(channels.scales)
        self._fill(parameter, values, [None] * len(parameter.pieces))
        return Int8Weight(values, torch.cat(scales))

    def _fill(self, parameter: Parameter, tensor: torch.Tensor, scales: Sequence[Blocks | Channels | None]) -> None:
        futures = [self._pool.submit(self._read, chunk) for chunk in self._chunks(parameter, tensor, scales)]
        for future in as_completed(futures):
            self.bytes_read += future.result()
            if self._progress is not None:
                self._progress(self.bytes_read, self.bytes_total)

    def _form(self, parameter: Parameter) -> Form:
        return form_of(parameter, self._hold, [self._index[piece.name].dtype for piece in parameter.pieces])

    def _chunks(
        self, parameter: Parameter, tensor: torch.Tensor, scales: Sequence[Blocks | Channels | None]
    ) -> Iterator[_Chunk]:
        filled = 0
        for piece, piece_scales in zip(parameter.pieces, scales, strict=True):
            if not piece.num_rows:
                continue
            whole = self._slice(piece)
            step = max(1, _CHUNK_BYTES * piece.num_rows // max(1, whole.size_bytes))
            for start in range(piece.rows[0], piece.rows[1], step):
                stop = min(start + step, piece.rows[1])
                target = tensor[filled : filled + stop - start]
                yield _Chunk(Slice(whole.entry, (start, stop), piece.columns), target, piece_scales)
                filled += stop - start
        tensor[filled:].zero_()

    def _slice(self, piece: Piece) -> Slice:
        return Slice(self._index[piece.name], piece.rows, piece.columns)

    def _scale_bytes(self, piece: Piece) -> int:
        scales = scales_of(self._index, piece, self._quantization)
        return 0 if scales is None else scales.size_bytes

    def _scales(self, piece: Piece) -> Blocks | Channels | None:
        return read_scales(self._index, piece, self._quantization, self._read_at_once)

    def _read_at_once(self, wanted: Slice, dtype: torch.dtype) -> torch.Tensor:
        self.bytes_read += wanted.size_bytes
        return read_slice(self._file(wanted.entry.path), wanted, dtype)

    @torch.inference_mode()
    def _read(self, chunk: _Chunk) -> int:
        """Fills the chunk's target and returns how many bytes were read."""
        source, target = chunk.source, chunk.target
        file = self._file(source.entry.path)
        if chunk.scales is not None:
            chunk.scales.decode_(read_slice(file, source, _DTYPES[source.entry.dtype]), source, target)
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


def _check(
    folder: Path, index: Mapping[str, TensorEntry], piece: Piece, quantization: BlockQuantization | None
) -> None:
    entry = index.get(piece.name)
    if entry is None:
        raise CheckpointError(f"{folder} lacks the tensor {piece.name} that its config.json calls for")
    if entry.dtype not in _DTYPES:
        raise CheckpointError(
            f"{piece.name} is stored as {entry.dtype}, which is not supported; supported: {', '.join(_DTYPES)}"
        )
    if entry.shape != piece.shape:
        raise CheckpointError(
            f"{piece.name} has shape {list(entry.shape)} where config.json calls for {list(piece.shape)}"
        )
    if entry.dtype in (FP8, INT8):
        check_scales(index, piece, quantization)
