"""FP8 weights, e4m3 values with a scale per block (DeepSeek-V3, arXiv 2412.19437, section 3.3).

The scales of `NAME` [..., rows, columns] are `NAME_scale_inv` [..., rows / block, columns / block], rounded up: fp32,
bf16, or e8m0, which is an exponent alone (as float8_e8m0fnu or as its bits).
"""

from __future__ import annotations

import math

import torch

from workers.kernels.quantized import decode_e4m3
from workers.model.quantization import BlockQuantization

__all__ = ["SCALE_SUFFIX", "decode_scales", "dequantize_rows_", "quantize", "scale_shape", "scale_span"]

SCALE_SUFFIX = "_scale_inv"
_LARGEST = 448.0  # of e4m3
_ROWS = 32  # decoded at a time, so that what lies between stays in the processor's cache


def scale_shape(shape: tuple[int, ...], block: BlockQuantization) -> tuple[int, ...]:
    """The shape of the scales of a tensor of `shape`."""
    return (*shape[:-2], -(-shape[-2] // block.rows), -(-shape[-1] // block.columns))


def scale_span(shape: tuple[int, ...], block: BlockQuantization, rows: tuple[int, int]) -> tuple[int, int]:
    """The rows of the scales that `rows` need, both counted over all dimensions but the last."""
    height = shape[-2]
    per_matrix = -(-height // block.rows)

    def scale_row(row: int) -> int:
        return row // height * per_matrix + row % height // block.rows

    return scale_row(rows[0]), scale_row(rows[1] - 1) + 1


def decode_scales(raw: torch.Tensor) -> torch.Tensor:
    """Scales in fp32, whatever they are stored as."""
    if raw.dtype == torch.uint8:
        raw = raw.view(torch.float8_e8m0fnu)
    return raw.to(torch.float32)


def dequantize_rows_(
    raw: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    *,
    shape: tuple[int, ...],
    block: BlockQuantization,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    """Writes to `out` the values of the bytes `raw` [rows, columns], a rectangle of a tensor of `shape`.

    `scales` [n, columns / block] in fp32 are the whole rows of `scale_span`.
    """
    height = shape[-2]
    first_scale = scale_span(shape, block, rows)[0]
    column_of = torch.arange(columns[0], columns[1]) // block.columns
    row = rows[0]
    while row < rows[1]:
        in_matrix = row % height
        end_of_block = row - in_matrix + min(height, (in_matrix // block.rows + 1) * block.rows)
        stop = min(rows[1], end_of_block, row + _ROWS)
        scale = scales[scale_span(shape, block, (row, stop))[0] - first_scale][column_of]
        part = slice(row - rows[0], stop - rows[0])
        out[part].copy_(decode_e4m3(raw[part], scale))
        row = stop


def quantize(
    weight: torch.Tensor, block: BlockQuantization, *, exponents_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and fp32 scales of `weight` [..., rows, columns]; powers of two where `exponents_only`."""
    grid = scale_shape(tuple(weight.shape), block)
    below = grid[-2] * block.rows - weight.shape[-2]
    beside = grid[-1] * block.columns - weight.shape[-1]
    padded = torch.nn.functional.pad(weight.float(), (0, beside, 0, below))
    blocks = padded.view(*grid[:-1], block.rows, grid[-1], block.columns)
    scales = blocks.abs().amax(dim=(-3, -1)).clamp_(min=math.ldexp(1.0, -60)) / _LARGEST
    if exponents_only:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    values = (blocks / scales[..., :, None, :, None]).view(padded.shape)[..., : weight.shape[-2], : weight.shape[-1]]
    return values.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scales
