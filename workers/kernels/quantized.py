"""Weights in eight bits: what they are, and the linear layers on them in plain torch.

int8: symmetric, with one fp32 scale per output. FP8: e4m3 with one fp32 scale per output and block of inputs, so that
rows may be cut, stacked and reordered whatever the blocks of rows in the checkpoint were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

__all__ = [
    "Fp8Weight",
    "Int8Weight",
    "QuantizedLinear",
    "Weight",
    "decode_e4m3",
    "move",
    "quantize_int8",
    "row_tensors",
]

_LARGEST = 127.0
_TILE_BYTES = 1 << 20  # of dequantised weights, so that they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """`values` int8 [out, in] times `scales` fp32 [out]."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantize(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        return (self.values[rows].to(torch.float32) * self.scales[rows, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """`values`, the bytes of e4m3 numbers [out, in], times `scales` fp32 [out, blocks of inputs].

    A block has `width` inputs; the first lacks the `skipped` that came before this rank's part.
    """

    values: torch.Tensor
    scales: torch.Tensor
    width: int
    skipped: int

    def dequantize(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        num_inputs = self.values.shape[1]
        if num_inputs % self.width == 0 and not self.skipped:
            raw = self.values[rows].view(-1, num_inputs // self.width, self.width)
            return decode_e4m3(raw, self.scales[rows, :, None]).view(-1, num_inputs).to(dtype)
        block = torch.arange(self.skipped, self.skipped + num_inputs, device=self.values.device) // self.width
        return decode_e4m3(self.values[rows], self.scales[rows][:, block]).to(dtype)


Weight = torch.Tensor | Int8Weight | Fp8Weight


def row_tensors(weight: Weight) -> tuple[torch.Tensor, ...]:
    """The tensors of `weight` that have a row per output: what is done to its rows is done to theirs."""
    return (weight,) if isinstance(weight, torch.Tensor) else (weight.values, weight.scales)


def move(weight: Weight, device: torch.device) -> Weight:
    if isinstance(weight, torch.Tensor):
        return weight.to(device)
    return replace(weight, values=weight.values.to(device), scales=weight.scales.to(device))


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """The nearest values of `weight` [..., in]; leading dimensions are rows. A row of zeros has the scale 0."""
    rows = weight.flatten(0, -2).to(torch.float32)
    scales = rows.abs().amax(1) / _LARGEST
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
    return Int8Weight((rows * inverse[:, None]).round_().to(torch.int8), scales)


def decode_e4m3(raw: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`raw` e4m3 bytes times `scale`, in fp32.

    torch's own conversion is ten times slower on a CPU. An e4m3 value's bits, moved to where fp16 has sign, exponent
    and mantissa, are that value times 2^-8. (NaN, which no weight is, comes out as 480.)
    """
    half = raw.view(torch.int8).to(torch.int16)  # extends the sign to bit 15
    half.bitwise_left_shift_(7).bitwise_and_(-0x4080)  # 0xbf80 as a signed number: sign, lower exponent, mantissa
    return half.view(torch.float16).to(torch.float32).mul_(scale * 256.0)


class QuantizedLinear:
    """Dequantises a tile of outputs, multiplies, and goes on to the next: right everywhere, and slow."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Int8Weight | Fp8Weight, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_outputs, num_inputs = self._weight.values.shape
        y = x.new_empty(len(x), num_outputs)
        step = max(16, _TILE_BYTES // (num_inputs * torch.float32.itemsize))
        for start in range(0, num_outputs, step):
            rows = slice(start, start + step)
            bias = None if self._bias is None else self._bias[rows]
            y[:, rows] = F.linear(x, self._weight.dequantize(rows, x.dtype), bias)
        return y

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(self(x))
