"""int8 weights: the nearest values, and products that match those of the dequantised weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from workers.kernels.cpu import PackedKernels
from workers.kernels.int8 import BytesLinear, has_byte_instructions
from workers.kernels.quantized import Int8Weight, quantize_int8
from workers.kernels.reference import ReferenceKernels
from workers.kernels.seam import Kernels

_KERNELS: list[Kernels] = [ReferenceKernels(), PackedKernels()]
_needs_bytes = pytest.mark.skipif(not has_byte_instructions(), reason="no VNNI")


def _weight(outputs: int, inputs: int) -> tuple[Int8Weight, torch.Tensor]:
    weight = quantize_int8(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs)))
    return weight, weight.values.double() * weight.scales.double()[:, None]


def test_values_are_the_nearest() -> None:
    weight = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    weight[1, 2] = 0.0
    weight[2, 4, 7] = 90.0
    got = quantize_int8(weight)
    assert got.values.abs().amax(1).tolist() == [127] * 7 + [0] + [127] * 7
    back = (got.values.float() * got.scales[:, None]).view(weight.shape)
    assert bool(((back - weight).abs() <= got.scales.view(3, 5, 1) * 0.5001).all())
    assert torch.equal(quantize_int8(back).values, got.values)


@pytest.mark.parametrize("kernels", _KERNELS, ids=lambda kernels: type(kernels).__name__)
@pytest.mark.parametrize("rows", [0, 1, 5, 33, 70])
@torch.inference_mode()
def test_products_match_the_dequantised_weights(kernels: Kernels, rows: int) -> None:
    weight, exact = _weight(96, 176)
    generator = torch.Generator().manual_seed(rows)
    bias = torch.randn(96, generator=generator).bfloat16()
    x = torch.randn(rows, 176, generator=generator).bfloat16()
    x[:1] *= 1e-4
    x[1:2, 3] = 300.0  # activations have outliers
    expected = F.linear(x.double(), exact, bias.double())

    def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
        """Results of bf16 operations, rounded up to three times, of a row with such values."""
        assert got.dtype == torch.bfloat16
        assert got.shape == wanted.shape
        largest = wanted.abs().amax(1) if rows else torch.zeros(0)
        assert bool(((got.double() - wanted).abs().amax(1) <= 2**-6 * largest).all()) if rows else True

    linear = kernels.linear(weight, bias)
    check(linear(x), expected)
    residual = torch.randn(rows, 96, generator=generator).bfloat16()
    check(linear.plus(x, residual.clone()), expected + residual)
    gate, up = expected.chunk(2, dim=1)
    check(kernels.gated_linear(weight, bias)(x), F.silu(gate) * up)


@_needs_bytes
@torch.inference_mode()
def test_bytes_lose_less_than_bf16_does() -> None:
    weight, exact = _weight(64, 512)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[7, 100] = 200.0
    expected = x.double() @ exact.t()
    got = BytesLinear(weight, None)._multiply(x).double()
    assert bool(((got - expected).norm(dim=1) <= 2**-10 * expected.norm(dim=1)).all())


@_needs_bytes
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    linear = BytesLinear(_weight(80, 320)[0], None)
    x = torch.randn(65, 320, generator=torch.Generator().manual_seed(6)).bfloat16()
    whole = linear(x)
    for first, last in ((0, 1), (3, 5), (10, 42), (64, 65)):
        assert torch.equal(linear(x[first:last]), whole[first:last])


@_needs_bytes
@torch.inference_mode()
def test_what_is_not_a_number_stays_so() -> None:
    x = torch.ones(2, 64).bfloat16()
    x[0, 5] = float("nan")
    y = BytesLinear(_weight(32, 64)[0], None)(x)
    assert bool(y[0].isnan().all())
    assert bool(y[1].isfinite().all())
