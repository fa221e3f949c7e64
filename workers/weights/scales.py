"""The scales beside a checkpoint's quantized tensors: which there must be, which a piece needs, what they make of it.

FP8: `NAME_scale_inv`, one per block (`fp8.py`). int8: `NAME_scale` [..., rows, 1], one per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from workers.model.parameters import Piece
from workers.model.quantization import BlockQuantization
from workers.weights.fp8 import SCALE_SUFFIX, decode_scales, dequantize_rows_, scale_shape, scale_span
from workers.weights.index import CheckpointError, TensorEntry
from workers.weights.slices import Slice

__all__ = ["FP8", "INT8", "INT8_SCALE_SUFFIX", "Blocks", "Channels", "Read", "check_scales", "read_scales", "scales_of"]

FP8, INT8 = "F8_E4M3", "I8"
INT8_SCALE_SUFFIX = "_scale"
_FP8_SCALES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
_INT8_SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Read = Callable[[Slice, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The fp32 scales of an FP8 tensor, whole rows of them from `first` on."""

    form: BlockQuantization
    scales: torch.Tensor
    first: int

    def decode_(self, raw: torch.Tensor, source: Slice, target: torch.Tensor) -> None:
        assert source.columns is not None
        span = scale_span(source.entry.shape, self.form, source.rows)
        dequantize_rows_(
            raw.view(torch.uint8),
            self.scales[span[0] - self.first : span[1] - self.first],
            target,
            shape=source.entry.shape,
            block=self.form,
            rows=source.rows,
            columns=source.columns,
        )

    def per_row(self, piece: Piece) -> torch.Tensor:
        """Scales [rows, blocks] of the piece."""
        assert piece.columns is not None
        height, rows = piece.shape[-2], torch.arange(*piece.rows)
        lines = rows // height * -(-height // self.form.rows) + rows % height // self.form.rows
        width = self.form.columns
        return self.scales[lines - self.first, piece.columns[0] // width : (piece.columns[1] - 1) // width + 1]


@dataclass(frozen=True, slots=True)
class Channels:
    """The fp32 scales of an int8 tensor's rows from `first` on."""

    scales: torch.Tensor
    first: int

    def decode_(self, raw: torch.Tensor, source: Slice, target: torch.Tensor) -> None:
        scales = self.scales[source.rows[0] - self.first : source.rows[1] - self.first]
        target.copy_(raw.to(torch.float32).mul_(scales[:, None]))


def scales_of(index: Mapping[str, TensorEntry], piece: Piece, quantization: BlockQuantization | None) -> Slice | None:
    """The scales that a piece needs; None where it is not quantized. FP8: whole rows, for they are few."""
    entry = index[piece.name]
    if entry.dtype not in (FP8, INT8) or not piece.num_rows:
        return None
    if entry.dtype == INT8:
        return Slice(index[piece.name + INT8_SCALE_SUFFIX], piece.rows, (0, 1))
    assert quantization is not None
    scales = index[piece.name + SCALE_SUFFIX]
    return Slice(scales, scale_span(entry.shape, quantization, piece.rows), (0, scales.shape[-1]))


def read_scales(
    index: Mapping[str, TensorEntry], piece: Piece, quantization: BlockQuantization | None, read: Read
) -> Blocks | Channels | None:
    wanted = scales_of(index, piece, quantization)
    if wanted is None:
        return None
    if index[piece.name].dtype == INT8:
        return Channels(read(wanted, _INT8_SCALES[wanted.entry.dtype]).float().flatten(), wanted.rows[0])
    assert quantization is not None
    return Blocks(quantization, decode_scales(read(wanted, _FP8_SCALES[wanted.entry.dtype])), wanted.rows[0])


def check_scales(index: Mapping[str, TensorEntry], piece: Piece, quantization: BlockQuantization | None) -> None:
    """Raises CheckpointError where a quantized piece's scales are not what is called for."""
    dtype = index[piece.name].dtype
    if dtype == INT8:
        name, known = piece.name + INT8_SCALE_SUFFIX, tuple(_INT8_SCALES)
        expected: tuple[int, ...] = (*piece.shape[:-1], 1)
    else:
        if quantization is None or piece.columns is None:
            raise CheckpointError(
                f"{piece.name} is stored as {FP8}, of which config.json's quantization_config says nothing"
            )
        name, known = piece.name + SCALE_SUFFIX, tuple(_FP8_SCALES)
        expected = scale_shape(piece.shape, quantization)
    scales = index.get(name)
    if scales is None:
        raise CheckpointError(f"{piece.name} is stored as {dtype} without its scales, {name}")
    if scales.shape != expected or scales.dtype not in known:
        raise CheckpointError(
            f"{name} is {scales.dtype} {list(scales.shape)} where {list(expected)} of {', '.join(known)} are called for"
        )
