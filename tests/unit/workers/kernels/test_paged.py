"""Attention that reads the paged cache where it lies: in torch, as a Triton kernel, and flash-attn's part."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.unit.workers.kernels.paged_cases import CASES, PagedCase, one_by_one
from workers.kernels import libraries
from workers.kernels.cuda import CudaKernels
from workers.kernels.paged import attend_paged
from workers.kernels.reference import ReferenceKernels
from workers.kernels.select import select_kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (286 MB)")


@pytest.mark.parametrize("case", CASES)
def test_torch(case: PagedCase) -> None:
    got = case.run(attend_paged)
    assert got.dtype == case.dtype
    assert float((got.float() - one_by_one(case)).abs().max()) < (1e-5 if case.dtype == torch.float32 else 2e-3)


@needs_triton
@pytest.mark.parametrize("what", ["interpret", "compile"])
def test_triton_where_there_is_no_gpu(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.workers.kernels.triton_process", what],
        env=os.environ | ({"TRITON_INTERPRET": "1"} if what == "interpret" else {}),
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class FlashAttention:
    """flash_attn_func by its documentation: [1, T, H, D], causal to the bottom right corner."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float | None, causal: bool
    ) -> torch.Tensor:
        assert causal
        assert {x.stride(-1) for x in (q, k, v)} == {1}
        self.calls += 1
        tokens, context = q.shape[1], k.shape[1]
        visible = torch.ones(tokens, context, dtype=torch.bool).tril(context - tokens)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)


@pytest.mark.parametrize(("tokens", "context"), [(7, 7), (5, 12), (1, 4)])
@pytest.mark.parametrize(("width", "goes"), [(16, True), (288, False)])
def test_prompts_go_to_flash_attention_where_it_can(tokens: int, context: int, width: int, goes: bool) -> None:
    kernels = CudaKernels({})
    flash = FlashAttention()
    kernels._flash = flash
    x = [torch.randn(1, heads, count, width) for heads, count in ((4, tokens), (2, context), (2, context))]
    q, k, v = (part.to(torch.bfloat16) for part in x)
    mask = None
    if tokens < context:
        hidden = torch.arange(context) > torch.arange(context - tokens, context)[:, None]
        mask = torch.zeros(tokens, context, dtype=torch.bfloat16).masked_fill_(hidden, -torch.inf)
    expected = ReferenceKernels().attend_prefill(q, k, v, mask)
    torch.testing.assert_close(kernels.attend_prefill(q, k, v, mask), expected, rtol=2e-2, atol=2e-2)
    assert flash.calls == int(goes)
    kernels.attend_prefill(q.float(), k.float(), v.float(), None if mask is None else mask.float())
    assert flash.calls == int(goes), "it knows no fp32"


def test_what_is_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"triton", "flash_attn"}
    versions = {"triton": "3.9.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    present: Any = lambda name: object() if name in installed else None  # noqa: E731
    monkeypatch.setattr(libraries, "find_spec", present)
    monkeypatch.setattr(libraries, "version", version)
    libraries.found.cache_clear()
    assert {name: str(library) for name, library in libraries.found().items()} == {
        "flash-attn": "flash-attn",
        "triton": "triton 3.9.0",
    }
    libraries.found.cache_clear()


def test_a_gpu_gets_its_kernels_and_they_say_what_they_are() -> None:
    assert CudaKernels({}).description == "torch; attention: torch for prompts, torch for decoding, torch from latents"
    if find_spec("flash_attn") is None:
        assert isinstance(select_kernels(torch.device("cuda"), torch.bfloat16), CudaKernels)
