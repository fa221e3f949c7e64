"""The packed kernels against the plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from workers.kernels.cpu import PackedKernels, can_pack
from workers.kernels.reference import ReferenceKernels
from workers.kernels.select import select_kernels

pytestmark = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="oneDNN has no bfloat16 kernels for this CPU")

REFERENCE, PACKED = ReferenceKernels(), PackedKernels()
ROWS = (1, 3, 16, 17, 130)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def _close(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """No further from the fp32 result than the plain kernel is, with half a bfloat16 step to spare."""
    assert got.dtype == plain.dtype
    assert got.shape == plain.shape
    size = exact.abs().max()
    assert (got - exact).abs().max() <= (plain - exact).abs().max() + size / 256


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(rows: int, biased: bool) -> None:
    x, weight, residual = _random(rows, 50), _random(37, 50, seed=1, scale=0.2), _random(rows, 37, seed=2)
    bias = _random(37, seed=3) if biased else None
    exact = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    plain, packed = REFERENCE.linear(weight, bias), PACKED.linear(weight, bias)
    _close(packed(x), exact, plain(x))
    _close(packed.plus(x, residual.clone()), exact + residual.float(), plain.plus(x, residual.clone()))


@pytest.mark.parametrize("rows", ROWS)
def test_linear_reads_part_of_wider_rows(rows: int) -> None:
    wide, weight = _random(rows, 120), _random(37, 50, seed=1, scale=0.2)
    packed = PACKED.linear(weight, None)
    assert torch.equal(packed(wide[:, 30:80]), packed(wide[:, 30:80].contiguous()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("biased", [False, True])
def test_gated_linear(rows: int, biased: bool) -> None:
    x, weight = _random(rows, 50), _random(2 * 33, 50, seed=1, scale=0.2)
    bias = _random(2 * 33, seed=3) if biased else None
    exact = ReferenceKernels().gated_linear(weight.float(), None if bias is None else bias.float())(x.float())
    _close(PACKED.gated_linear(weight, bias)(x), exact, REFERENCE.gated_linear(weight, bias)(x))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_rms_norm(rows: int, scale: float) -> None:
    x, weight = _random(rows, 61, scale=scale) + scale, _random(61, seed=1)
    before = x.clone()
    exact = REFERENCE.rms_norm(weight.float(), 1e-6)(x.float())
    _close(PACKED.rms_norm(weight, 1e-6)(x), exact, REFERENCE.rms_norm(weight, 1e-6)(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("sequences", [1, 5])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_attend_decode(sequences: int, group: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    q = _random(sequences, 2, group, 16)
    k, v = _random(sequences, 2, 40, 16, seed=1), _random(sequences, 2, 40, 16, seed=2)
    mask = torch.zeros(sequences, 1, 1, 40).masked_fill_(torch.arange(40) >= 33, -torch.inf).bfloat16()
    exact = REFERENCE.attend_decode(q.float(), k.float(), v.float(), mask.float())
    got, plain = PACKED.attend_decode(q, k, v, mask), REFERENCE.attend_decode(q, k, v, mask)
    torch.set_num_threads(before)
    _close(got, exact, plain)


def test_select() -> None:
    cpu = torch.device("cpu")
    assert isinstance(select_kernels(cpu, torch.bfloat16), PackedKernels)
    assert type(select_kernels(cpu, torch.float32)) is ReferenceKernels
