"""Latent attention of decoding sequences and the projections around it against a loop in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.unit.workers.kernels.latent_cases import CASES, LatentCase
from workers.kernels.build import build
from workers.kernels.cuda import CudaKernels
from workers.kernels.flash_mla import FlashMLA
from workers.kernels.native import NativeKernels, find_native
from workers.kernels.paged import attend_latent_paged
from workers.kernels.reference import ReferenceKernels

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


@pytest.mark.parametrize("case", CASES)
def test_torch(case: LatentCase) -> None:
    q, cache, group = case.tensors()
    whole = ReferenceKernels().attend_latent(q, cache, group, case.rank, case.scale)
    for got in (whole, case.run(attend_latent_paged)):
        assert got.dtype == case.dtype
        assert float((got.float() - case.one_by_one()).abs().max()) < (1e-5 if case.dtype == torch.float32 else 2e-3)


class FlashMLALibrary:
    """Module `flash_mla` as its interface and `csrc/api/dense_decode.h` say; the schedule is good for one set of
    lengths."""

    def __init__(self, first_version: bool) -> None:
        self._first_version = first_version

    def get_mla_metadata(self, *arguments: Any) -> tuple[Any, Any]:
        lengths, _, key_heads = arguments
        assert (lengths.dtype, key_heads) == (torch.int32, 1)
        if self._first_version:
            return lengths.clone(), torch.zeros(len(lengths) + 1, dtype=torch.int32)
        return {}, None

    def flash_mla_with_kvcache(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        head_dim_v: int,
        tile_scheduler_metadata: Any,
        num_splits: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert (q.shape[1], q.shape[3], head_dim_v) == (1, 576, 512)
        assert k_cache.shape[1:] == (64, 1, 576)
        assert block_table.dtype == cache_seqlens.dtype == torch.int32
        assert {x.stride(-1) for x in (q, k_cache, block_table)} == {1}
        assert cache_seqlens.is_contiguous()
        if self._first_version:
            assert torch.equal(tile_scheduler_metadata, cache_seqlens)
        else:
            assert (tile_scheduler_metadata, num_splits) == ({}, None)
            tile_scheduler_metadata["used"] = True
        assert softmax_scale is not None
        out = attend_latent_paged(
            q[:, 0],
            k_cache.reshape(-1, 576),
            block_table.long(),
            cache_seqlens.long(),
            block_size=64,
            rank=512,
            scale=softmax_scale,
        )
        return out.unsqueeze(1), torch.empty(0)


@pytest.mark.parametrize("first_version", [False, True])
def test_latents_go_to_flash_mla_where_it_can(first_version: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CudaKernels({})
    kernels._flash_mla = FlashMLA(FlashMLALibrary(first_version))
    asked: list[int] = []

    def torch_serves(*arguments: Any, **sizes: Any) -> torch.Tensor:
        asked.append(sizes["block_size"])
        return attend_latent_paged(*arguments, **sizes)

    kernels._attend_latent = torch_serves
    for block_size, rank in ((64, 512), (16, 512), (64, 256)):
        case = LatentCase((70, 9), heads=16, rank=rank, rope=64, block_size=block_size, dtype=torch.bfloat16)
        q, cache, group = case.tensors()
        got = kernels.attend_latent(q, cache, group, rank, case.scale)
        torch.testing.assert_close(got.float(), case.one_by_one(), rtol=STEP, atol=5e-3)
    assert asked == [16, 64]


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("heads", "inputs", "outputs"), [(5, 64, 96), (3, 70, 33), (16, 128, 512)])
@pytest.mark.parametrize("transposed", [False, True])
def test_per_head(native: NativeKernels, rows: int, heads: int, inputs: int, outputs: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, heads, inputs + 8, generator=generator).bfloat16()[..., :inputs]
    weight = torch.randn(heads, inputs, outputs, generator=generator).bfloat16()
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    exact = torch.einsum("thi,hio->tho", x.float(), weight.float())
    torch.testing.assert_close(native.per_head(x, weight).float(), exact, rtol=STEP, atol=2e-2)


def test_a_row_has_the_same_bits_alone_and_with_any_threads(native: NativeKernels) -> None:
    x, weight = torch.randn(2, 5, 64).bfloat16(), torch.randn(5, 64, 96).bfloat16()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [native.per_head(x, weight), torch.cat([native.per_head(row[None], weight) for row in x])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)
