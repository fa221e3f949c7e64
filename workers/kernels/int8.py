"""int8 weights on processors whose oneDNN multiplies bytes (VNNI, AMX).

The weights stay int8 in oneDNN's own layout. Each row of x becomes a fixed-point number of 16 bits, scaled by the
row's largest value, and is multiplied as two rows of unsigned bytes: `x = scale * (256 * high + low)`, both less 128.
The products are summed in int32, so they are exact, and a row's result does not depend on the rows beside it. What
is lost, 2^-16 of a row's largest value, is less than bf16 loses on the result.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch.nn import functional as F

from workers.kernels.quantized import Fp8Weight, Int8Weight

__all__ = ["BytesGatedLinear", "BytesLinear", "can_multiply", "has_byte_instructions"]

_qlinear = torch.ops.onednn.qlinear_pointwise.default
_LARGEST = 32639.0  # what the two bytes reach
_OFFSET = 128 * 256 + 128.5  # makes the bytes unsigned, and rounds
_TINY = 1e-30
_ROWS = 32
_MAX_INPUTS = 65536  # more could overflow the int32 sums


def can_multiply(weight: Int8Weight | Fp8Weight) -> TypeGuard[Int8Weight]:
    """Whether this is for `weight` and this machine. For x in fp32 the fixed-point numbers would be too coarse."""
    if not isinstance(weight, Int8Weight) or weight.values.shape[1] > _MAX_INPUTS:
        return False
    return has_byte_instructions()


def has_byte_instructions() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())  # type: ignore[no-untyped-call]


class BytesLinear:
    __slots__ = ("_bias", "_scales", "_weight", "_zeros")

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.onednn.qlinear_prepack(weight.values.contiguous(), None)
        self._scales = weight.scales
        self._zeros = torch.zeros(len(weight.scales), dtype=torch.int32)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x).to(x.dtype)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(self._multiply(x))

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """In fp32."""
        count = len(x)
        if not count:
            return x.new_zeros(0, len(self._scales), dtype=torch.float32)
        digits, scale = _digits(x)
        weight = (self._weight, self._scales, self._zeros)
        y = _qlinear(digits, 1.0, 128, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        y = torch.add(y[count:], y[:count], alpha=256.0).mul_(scale)
        return y if self._bias is None else y.add_(self._bias)


class BytesGatedLinear:
    __slots__ = ("_gate_up",)

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        self._gate_up = BytesLinear(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def _digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high bytes of all rows above their low bytes, and each row's scale in fp32."""
    count = len(x)
    largest = x.abs().amax(1, keepdim=True).to(torch.float32).clamp_(min=_TINY)
    factor = _LARGEST / largest
    digits = torch.empty(2 * count, x.shape[1], dtype=torch.uint8)
    for start in range(0, count, _ROWS):  # what lies between stays in the processor's cache
        stop = min(start + _ROWS, count)
        fixed = x[start:stop].float().mul_(factor[start:stop]).add_(_OFFSET).to(torch.int32)
        digits[count + start : count + stop].copy_(fixed)  # keeps the lowest eight bits
        digits[start:stop].copy_(fixed.bitwise_right_shift_(8))
    return digits, largest.mul_(1.0 / _LARGEST)
