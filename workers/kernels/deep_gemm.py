"""Linear layers on FP8 weights by DeepGEMM (deepseek-ai/DeepGEMM), where it is installed. Not run on a GPU.

Its products take e4m3 activations with a scale for each token and 128 inputs, and e4m3 weights with one for each 128 x
128; the scales are fp32 on devices of compute capability 9.0, the only ones that this is used on. Our weights have a
scale for each output, so that rows can be cut and stacked (`quantized.py`): whole blocks are found in them again.
"""

from __future__ import annotations

from typing import Any

import torch

from workers.kernels.quantized import Fp8Weight

__all__ = ["DeepGemmLinear", "block_scales", "quantize_rows"]

_BLOCK = 128
_LARGEST = 448.0  # of e4m3
_OUTPUTS = 64  # of which their number must be a multiple


def block_scales(weight: Fp8Weight) -> torch.Tensor | None:
    """`weight`'s scales [blocks of outputs, blocks of inputs]; None where it is not made of whole blocks."""
    num_outputs, num_inputs = weight.values.shape
    if weight.width != _BLOCK or weight.skipped or num_inputs % _BLOCK or num_outputs % _OUTPUTS:
        return None
    found = weight.scales[::_BLOCK]
    same = found.repeat_interleave(_BLOCK, dim=0)[:num_outputs]
    return found.contiguous() if torch.equal(same, weight.scales) else None


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] as e4m3, and its scales [T, in / 128] fp32: each 128 inputs reach to e4m3's largest value."""
    blocks = x.float().unflatten(1, (-1, _BLOCK))  # type: ignore[no-untyped-call]
    scales = blocks.abs().amax(dim=2).clamp_min(1e-10) / _LARGEST
    return (blocks / scales.unsqueeze(2)).to(torch.float8_e4m3fn).flatten(1), scales


class DeepGemmLinear:
    """`library` is the module `deep_gemm`, or what has its `fp8_gemm_nt`; `scales` are the weight's `block_scales`."""

    __slots__ = ("_bias", "_product", "_scales", "_weight")

    def __init__(self, library: Any, weight: Fp8Weight, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._product = library.fp8_gemm_nt
        self._weight = weight.values.view(torch.float8_e4m3fn)
        self._scales = scales
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(len(x), len(self._weight))
        if len(x):
            self._product(quantize_rows(x), (self._weight, self._scales), y)
        return y if self._bias is None else y.add_(self._bias)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(self(x))
