"""The compiled kernels against the plain ones in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from workers.cache import LayerCache
from workers.kernels.build import build
from workers.kernels.native import NativeKernels, find_native
from workers.kernels.reference import ReferenceKernels
from workers.step import DecodeGroup

REFERENCE = ReferenceKernels()
BLOCK_SIZE = 16
STEP = 1 / 128  # between neighbouring bf16 values, relative to them, at most


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    build()
    library = find_native()
    assert library is not None
    return NativeKernels(library)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _group(lengths: list[int]) -> tuple[DecodeGroup, int]:
    """A group whose blocks lie in no order, and how many blocks there are."""
    context = max(lengths)
    blocks = -(-context // BLOCK_SIZE)
    order = torch.randperm(len(lengths) * blocks, generator=torch.Generator().manual_seed(9))
    return DecodeGroup(0, len(lengths), order, torch.tensor(lengths), context, None), len(order)


def _attention(q: torch.Tensor, cache: LayerCache, group: DecodeGroup, kv_heads: int, width: int) -> torch.Tensor:
    """Sequence by sequence and head by head, in fp32."""
    rows = []
    for index, length in enumerate(group.lengths.tolist()):
        blocks = group.block_ids.view(len(q), -1)[index]
        kept = cache.read(blocks)[:length].float()
        heads = q[index].float().view(kv_heads, -1, width)
        keys, values = kept.view(length, 2, kv_heads, width).unbind(1)
        scores = torch.einsum("kgd,tkd->kgt", heads, keys) / math.sqrt(width)
        rows.append(torch.einsum("kgt,tkd->kgd", scores.softmax(-1), values).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("lengths", [[1], [16], [37, 2, 300], [513, 256, 257, 1, 800]])
def test_attends_to_each_sequence_by_its_length(
    native: NativeKernels, width: int, queries: int, lengths: list[int]
) -> None:
    kv_heads = 3
    group, blocks = _group(lengths)
    cache = LayerCache(_random(blocks * BLOCK_SIZE, 2 * kv_heads * width, seed=1), BLOCK_SIZE)
    # Queries lie in wider rows, as in the output of the fused projection.
    q = _random(len(lengths), kv_heads * queries * width + 32, seed=2)[:, : kv_heads * queries * width]
    got = native.attend_cached(q, cache, group, kv_heads, width)
    assert native.ragged(width)
    torch.testing.assert_close(got.float(), _attention(q, cache, group, kv_heads, width), rtol=STEP, atol=2e-3)


def test_other_widths_are_left_to_torch(native: NativeKernels) -> None:
    if native.ragged(24):
        pytest.skip("compiled for any width on this processor")
    group, blocks = _group([20, 20])
    cache = LayerCache(_random(blocks * BLOCK_SIZE, 2 * 24, seed=1), BLOCK_SIZE)
    q = _random(2, 2 * 24, seed=2)
    got = native.attend_cached(q, cache, group, 1, 24)
    torch.testing.assert_close(got.float(), _attention(q, cache, group, 1, 24), rtol=2 * STEP, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 61), (16, 64), (130, 576), (3, 5, 32)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm(native: NativeKernels, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    x, weight = (_random(*shape) * scale).to(dtype), _random(shape[-1], seed=1)
    before = x.clone()
    exact = REFERENCE.rms_norm(weight.float(), 1e-6)(x.float())
    got = native.rms_norm(weight, 1e-6)(x)
    assert got.shape == x.shape
    assert got.dtype == weight.dtype
    torch.testing.assert_close(got.float(), exact, rtol=STEP, atol=1e-6)
    assert torch.equal(x, before)


def test_rms_norm_of_part_of_wider_rows(native: NativeKernels) -> None:
    wide, weight = _random(20, 96), _random(64, seed=1)
    norm = native.rms_norm(weight, 1e-6)
    assert torch.equal(norm(wide[:, 16:80]), norm(wide[:, 16:80].contiguous()))


@pytest.mark.parametrize("rows", [1, 17, 100])
def test_rotates_in_place(native: NativeKernels, rows: int) -> None:
    wide, cos, sin = _random(rows, 5 * 32), _random(rows, 1, 32, seed=1), _random(rows, 1, 32, seed=2)
    before = wide.clone()
    x = wide[:, 32:128].view(rows, 3, 32)
    exact = x.float()
    REFERENCE.rotate_(exact, cos.float(), sin.float())
    native.rotate_(x, cos, sin)
    torch.testing.assert_close(x.float(), exact, rtol=STEP, atol=1e-2)
    assert torch.equal(wide[:, :32], before[:, :32])
    assert torch.equal(wide[:, 128:], before[:, 128:])


@pytest.mark.parametrize("vocabulary", [20, 100, 5000])
@pytest.mark.parametrize("tied", [False, True])
def test_refines_the_largest_logits(native: NativeKernels, vocabulary: int, tied: bool) -> None:
    x, weight = _random(5, 48), _random(vocabulary, 48, seed=1)
    logits = torch.nn.functional.linear(x, weight)
    if tied:  # more equal ones than are refined
        logits.fill_(3.0)
    got = native.refine(logits, x, weight, 32)
    exact = x.float() @ weight.float().T
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    likely, others = order[:, :32], order[:, 32:]
    torch.testing.assert_close(got.gather(1, likely), exact.gather(1, likely))
    assert torch.equal(got.gather(1, others), logits.float().gather(1, others))


def test_logits_that_are_no_numbers_do_no_harm(native: NativeKernels) -> None:
    x, weight = _random(2, 48), _random(5000, 48, seed=1)
    logits = torch.nn.functional.linear(x, weight)
    logits[0, ::3] = torch.nan
    logits[1] = torch.inf
    assert torch.equal(native.refine(logits, x, weight, 32).isnan()[1:], logits.isnan()[1:])


def test_threads_do_not_change_a_bit(native: NativeKernels) -> None:
    group, blocks = _group([700, 30, 256])
    cache = LayerCache(_random(blocks * BLOCK_SIZE, 2 * 2 * 64, seed=1), BLOCK_SIZE)
    q, x = _random(3, 4 * 64, seed=2), _random(200, 64, seed=3)
    norm = native.rms_norm(_random(64), 1e-6)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((native.attend_cached(q, cache, group, 2, 64), norm(x)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
