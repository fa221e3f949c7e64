"""Operations for CPUs whose oneDNN computes in the model's dtype.

Weights are put into oneDNN's own blocked layout once, when the model is built: `F.linear` does that again at every
call, which costs half its time at these sizes. The activation, product and residual sum behind a linear layer are
done by oneDNN on the result while it is still in registers, and in fp32.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from workers.kernels.int8 import BytesGatedLinear, BytesLinear, can_multiply, has_byte_instructions
from workers.kernels.quantized import Weight
from workers.kernels.reference import ReferenceKernels
from workers.kernels.seam import GatedLinear, Linear, Norm

__all__ = ["PackedGatedLinear", "PackedKernels", "PackedLinear", "can_pack"]

_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_binary = torch.ops.mkldnn._linear_pointwise.binary
# oneDNN chooses the blocking for a number of rows; this one is good for 1 to 1024 (README.md).
_ROWS_HINT = 16
_FEW_ROWS = 16
_FEW_QUERIES = 8


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels of this machine's own for `dtype`."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


class PackedLinear:
    """`packed` is the weight in oneDNN's blocks."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias

    @property
    def packed(self) -> torch.Tensor:
        return self._weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _linear(x, self._weight, self._bias, "none", [], "")
        return y

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _linear_binary(x, residual, self._weight, self._bias, "add")
        return y

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _linear(x, self._weight, self._bias, "swish", [], "")
        return y

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _linear_binary(x, factor, self._weight, self._bias, "mul")
        return y


class PackedGatedLinear:
    __slots__ = ("_gate", "_up")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        gate, up = weight.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        self._gate = PackedLinear(gate, gate_bias)
        self._up = PackedLinear(up, up_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._up.times(x, self._gate.silu(x))


class _Norm:
    """RMS normalisation in few operations.

    Few rows in the model's dtype: the layer norm of x beside -x, whose mean is zero and whose variance is the mean
    square of x; two operations where every further one costs more than its arithmetic. Otherwise in fp32.
    """

    __slots__ = ("_dtype", "_epsilon", "_mirror", "_mirrored", "_scaled", "_shape", "_width_epsilon")

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        width = len(weight)
        self._dtype = weight.dtype
        self._epsilon = epsilon
        self._shape = [2, width]
        self._mirrored = weight.repeat(2).view(2, width)
        self._mirror = torch.tensor([[1.0], [-1.0]], dtype=weight.dtype)
        self._scaled = weight.float() * math.sqrt(width)
        self._width_epsilon = torch.tensor([[width * epsilon]])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= _FEW_ROWS and x.dtype == self._dtype:
            mirrored = torch.layer_norm(x.unsqueeze(1) * self._mirror, self._shape, self._mirrored, None, self._epsilon)
            return mirrored.select(1, 0)
        y = x.float()
        length = torch.linalg.vector_norm(y, 2, -1, True)
        scale = torch.addcmul(self._width_epsilon, length, length).rsqrt_()
        return (y * scale).mul_(self._scaled).to(self._dtype)


class PackedKernels(ReferenceKernels):
    """See `Kernels`."""

    description = "torch with oneDNN packed weights"
    packs_weights = True

    def __init__(self, note: str = "") -> None:
        """`note` is told beside the description."""
        if note:
            self.description = f"{self.description} ({note})"

    def describe(self, quantization: str) -> str:
        if quantization == "int8" and has_byte_instructions():
            return f"{self.description}; int8 weights multiplied as bytes"
        return super().describe(quantization)

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if isinstance(weight, torch.Tensor):
            return PackedLinear(weight, bias)
        return BytesLinear(weight, bias) if can_multiply(weight) else super().linear(weight, bias)

    def rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        return _Norm(weight, epsilon)

    def attend_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None = None,
    ) -> torch.Tensor:
        if torch.get_num_threads() > 1 or q.shape[2] > _FEW_QUERIES:
            return super().attend_decode(q, k, v, mask, scale)
        # One thread does better with a call per query head where few share their keys, several threads with the
        # reference's larger pieces (README.md).
        heads = q.reshape(len(q), -1, 1, q.shape[3])
        out = F.scaled_dot_product_attention(heads, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.reshape(len(q), -1)

    def gated_linear(self, weight: Weight, bias: torch.Tensor | None) -> GatedLinear:
        if isinstance(weight, torch.Tensor):
            return PackedGatedLinear(weight, bias)
        return BytesGatedLinear(weight, bias) if can_multiply(weight) else super().gated_linear(weight, bias)
