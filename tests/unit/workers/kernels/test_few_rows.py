"""Products of few rows against oneDNN's and against fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from workers.kernels import few_rows
from workers.kernels.build import build, library_path
from workers.kernels.cpu import PackedKernels
from workers.kernels.few_rows import FewRows
from workers.kernels.native import NativeKernels, find_native
from workers.kernels.quantized import quantize_int8
from workers.kernels.seam import MLPPart
from workers.model.experts import Experts
from workers.parallel.dispatch import ExpertRows

STEP = 1 / 128  # between neighbouring bf16 values, relative to them, at most
SHAPES = [(32, 32), (96, 64), (512, 1024), (1024, 96)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def products() -> FewRows:
    build()
    found = FewRows(library_path())
    if not found.most:
        pytest.skip("this processor has no bf16 products")
    return found


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for bf16's own rounding; `expected` is in fp32."""
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    error = (found.float() - expected).abs()
    assert bool((error <= STEP * expected.abs() + 1e-3 * expected.abs().max()).all())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_layer_of_any_few_rows(products: FewRows, shape: tuple[int, int], threads: int) -> None:
    weight, bias = _random(*shape, seed=1), _random(shape[0], seed=2)
    plain, biased = products.linear(weight, None), products.linear(weight, bias)
    assert plain is not None
    assert biased is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 40):
            wide = _random(rows, shape[1] + 16, seed=rows)
            x, residual = wide[:, : shape[1]], _random(rows, shape[0], seed=99)
            expected = F.linear(x.float(), weight.float())
            if rows:
                _close(plain(x), expected)
                _close(biased(x), expected + bias.float())
                _close(plain.plus(x, residual.clone()), expected + residual.float())
            assert plain(x).shape == (rows, shape[0])
    finally:
        torch.set_num_threads(before)


def test_threads_do_not_change_bits(products: FewRows) -> None:
    layer, gated = products.linear(_random(256, 128), None), products.gated_linear(_random(512, 128), None)
    assert layer is not None
    assert gated is not None
    x = _random(3, 128, seed=5)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((layer(x), gated(x)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_a_gated_layer(products: FewRows, rows: int) -> None:
    weight, x = _random(2 * 96, 64, seed=1), _random(rows, 64, seed=2)
    gated = products.gated_linear(weight, None)
    assert gated is not None
    gate, up = F.linear(x.float(), weight.float()).chunk(2, dim=-1)
    _close(gated(x), F.silu(gate) * up)


@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 1], [8, 1, 2, 0], [1, 9, 0, 2]])
def test_experts_at_once_are_those_one_by_one(products: FewRows, counts: list[int]) -> None:
    library = find_native()
    assert library is not None
    hidden, inner = 64, 96
    native, onednn = (Experts(len(counts), kernels) for kernels in (NativeKernels(library), PackedKernels()))
    for slot in range(len(counts)):
        weights = _random(2 * inner, hidden, seed=slot) * 0.3, _random(hidden, inner, seed=100 + slot) * 0.3
        for experts in (native, onednn):
            experts.put(slot, *(weight.clone() for weight in weights))
    rows = ExpertRows(_random(sum(counts), hidden, seed=7), counts)
    expected = onednn(rows).float()
    assert (native(rows).float() - expected).abs().max() <= 2 * STEP * expected.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 6, 8, 13, 16])
def test_parts_of_a_gated_mlp_add_up_to_it(products: FewRows, rows: int, threads: int) -> None:
    hidden, inner = 96, 160
    gate_up, down_weight = _random(2 * inner, hidden, seed=1) * 0.2, _random(hidden, inner, seed=2) * 0.2
    gated, down = products.gated_linear(gate_up.clone(), None), products.linear(down_weight.clone(), None)
    assert gated is not None
    assert down is not None
    limits = products.mlp_parts(gated, down)
    assert limits is not None
    assert (limits.rows, limits.inner) == (16, inner)
    x, own = _random(rows, hidden, seed=3), _random(2, hidden, seed=4)
    gate, up = F.linear(x.float(), gate_up.float()).chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * up, down_weight.float())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        total = torch.zeros_like(expected)
        for first, last in ((0, limits.step), (limits.step, limits.step), (limits.step, inner)):
            part = MLPPart(gated, down, first, last, rows)
            alone = products.experts((), x, (), part)
            assert alone is not None
            beside = products.experts([(gated, down)], torch.cat((own, x)), [2], part)
            assert beside is not None
            assert torch.equal(beside[2:], alone), "what is computed beside it does not matter"
            assert bool(alone.any()) == (last > first)
            total += alone.float()
    finally:
        torch.set_num_threads(before)
    assert (total - expected).abs().max() <= 2 * STEP * expected.abs().max()


def test_large_gates_are_numbers(products: FewRows) -> None:
    """A gate far below zero lets nothing through, and the exponential that says so has no end."""
    gated = products.gated_linear(torch.cat((torch.full((32, 32), 10.0), torch.ones(32, 32))).bfloat16(), None)
    assert gated is not None
    x = torch.tensor([[-1.0] * 32, [1.0] * 32]).bfloat16()
    expected = torch.tensor([[0.0] * 32, [320.0 * 32] * 32]).bfloat16()
    torch.testing.assert_close(gated(x), expected, atol=1e-20, rtol=0.0)


def test_what_it_is_not_for_stays_onednns(products: FewRows) -> None:
    assert products.linear(_random(33, 64), None) is None
    assert products.linear(_random(64, 40), None) is None
    assert products.linear(quantize_int8(torch.randn(64, 64)), None) is None
    assert products.gated_linear(_random(2 * 48, 64), None) is None
    assert products.gated_linear(_random(64, 64), _random(64)) is None


def test_blocks_that_lie_otherwise_are_left_alone(
    products: FewRows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As another version of oneDNN might have them: here its first outputs are its last."""
    other = FewRows(library_path())
    monkeypatch.setattr(few_rows._FewRowsLinear, "by_onednn", lambda self, x: self._few(x, None).flip(1))
    assert other.linear(_random(64, 64), None) is None
    assert other.linear(_random(64, 64), None) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not as expected" in caplog.text
