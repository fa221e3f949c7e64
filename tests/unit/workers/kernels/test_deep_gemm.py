"""FP8 linear layers through DeepGEMM's interface, with a product that does what its documentation says."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.cuda import CudaKernels
from workers.kernels.deep_gemm import DeepGemmLinear, block_scales, quantize_rows
from workers.kernels.quantized import Fp8Weight, QuantizedLinear

Scaled = tuple[torch.Tensor, torch.Tensor]


class Library:
    """`fp8_gemm_nt` of module `deep_gemm` (csrc/apis/gemm.hpp): d = a @ b.T."""

    def __init__(self) -> None:
        self.calls = 0

    def fp8_gemm_nt(self, a: Scaled, b: Scaled, d: torch.Tensor) -> None:
        self.calls += 1
        rows, (outputs, inputs) = len(a[0]), b[0].shape
        assert rows > 0
        assert a[0].dtype == b[0].dtype == torch.float8_e4m3fn
        assert (d.dtype, d.shape) == (torch.bfloat16, (rows, outputs))
        assert (a[1].dtype, a[1].shape) == (torch.float32, (rows, inputs // 128))
        assert (b[1].dtype, b[1].shape) == (torch.float32, (-(-outputs // 128), inputs // 128))
        assert all(x.is_contiguous() for x in (*a, *b, d))
        left = a[0].float() * a[1].repeat_interleave(128, dim=1)
        right = b[0].float() * b[1].repeat_interleave(128, dim=0)[:outputs].repeat_interleave(128, dim=1)
        d.copy_(left @ right.T)


def _weight(outputs: int, inputs: int, *, width: int = 128, skipped: int = 0) -> Fp8Weight:
    generator = torch.Generator().manual_seed(outputs)
    values = torch.randn(outputs, inputs, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
    blocks = torch.rand(-(-outputs // 128), -(-(inputs + skipped) // width), generator=generator) + 0.5
    return Fp8Weight(values, blocks.repeat_interleave(128, dim=0)[:outputs].contiguous(), width, skipped)


@pytest.mark.parametrize("rows", [0, 1, 5, 130])
@pytest.mark.parametrize("outputs", [64, 256, 576])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_same_as_dequantised(rows: int, outputs: int, with_bias: bool) -> None:
    kernels, library = CudaKernels({}), Library()
    kernels._deep_gemm = library
    weight = _weight(outputs, 384)
    bias = torch.randn(outputs).bfloat16() if with_bias else None
    x = torch.randn(rows, 384, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear = kernels.linear(weight, bias)
    assert isinstance(linear, DeepGemmLinear)
    expected = QuantizedLinear(weight, bias)(x)
    got = linear(x)
    assert library.calls == int(rows > 0)
    if rows:  # e4m3 has three bits behind the point: a product's error is some hundredths of its size
        assert float((got - expected).float().norm() / expected.float().norm()) < 0.05
    residual = torch.ones_like(expected)
    torch.testing.assert_close(linear.plus(x, residual), got + 1.0)


def test_other_weights_are_dequantised() -> None:
    kernels = CudaKernels({})
    kernels._deep_gemm = Library()
    uneven = _weight(256, 256)
    uneven.scales[5] += 1.0
    for weight in (
        uneven,
        _weight(250, 256),
        _weight(256, 200),
        _weight(256, 256, width=64),
        _weight(256, 128, skipped=64),
    ):
        assert block_scales(weight) is None
        assert isinstance(kernels.linear(weight, None), QuantizedLinear)


def test_rows_are_scaled_to_the_largest_value() -> None:
    x = torch.randn(3, 256).bfloat16() * torch.tensor([[1e-3], [1.0], [300.0]]).bfloat16()
    x[0] = 0
    values, scales = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert float(values[1:].float().abs().view(2, 2, 128).amax(dim=2).min()) == 448.0
    restored = values.float() * scales.repeat_interleave(128, dim=1)
    assert torch.equal(restored[0], torch.zeros(256))
    torch.testing.assert_close(restored[1:], x[1:].float(), rtol=1 / 14, atol=0.4)
