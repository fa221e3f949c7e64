"""Operations for CUDA devices: torch's own, and libraries' where they are installed. Not run on a GPU.

Prompts go to flash-attn where it can do what is asked; decoding reads the paged cache where it lies, by a Triton
kernel, so that a step's shapes are those of its batch alone and can be recorded (`workers/graphs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from workers.cache import LayerCache
from workers.kernels import paged
from workers.kernels.deep_gemm import DeepGemmLinear, block_scales
from workers.kernels.flash_mla import BLOCK_SIZE, FlashMLA, takes
from workers.kernels.libraries import Library, found
from workers.kernels.quantized import Fp8Weight, Weight
from workers.kernels.reference import ReferenceKernels
from workers.kernels.seam import Linear
from workers.step import DecodeGroup

__all__ = ["CudaKernels"]

_WIDEST_HEAD = 256  # that flash-attn has kernels for


class CudaKernels(ReferenceKernels):
    """See `Kernels`. `libraries` are those to use; None: those that are installed."""

    def __init__(self, libraries: Mapping[str, Library] | None = None) -> None:
        libraries = found() if libraries is None else libraries
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        self._flash: Any = None
        self._flash_mla: FlashMLA | None = None
        self._attend_paged: Callable[..., torch.Tensor] = paged.attend_paged
        self._attend_latent: Callable[..., torch.Tensor] = paged.attend_latent_paged
        prompts = decoding = latents = "torch"
        if "flash-attn" in libraries:
            from flash_attn import flash_attn_func

            self._flash = flash_attn_func
            prompts = str(libraries["flash-attn"])
        if "triton" in libraries:
            from workers.kernels import triton_latent, triton_paged

            self._attend_paged, self._attend_latent = triton_paged.attend_paged, triton_latent.attend_latent_paged
            decoding = latents = str(libraries["triton"])
        if "FlashMLA" in libraries and capability == (9, 0):
            import flash_mla

            self._flash_mla = FlashMLA(flash_mla)
            latents = f"{libraries['FlashMLA']} where inference.block_size is {BLOCK_SIZE}, else {latents}"
        self._deep_gemm: Any = None
        self._fp8 = "dequantised in tiles"
        if "DeepGEMM" in libraries and capability == (9, 0):
            import deep_gemm

            self._deep_gemm = deep_gemm
            self._fp8 = f"by {libraries['DeepGEMM']} where they are whole blocks of 128, else dequantised in tiles"
        self.groups_experts = capability[0] in (9, 10)  # elsewhere torch's own is a loop that waits for the device
        self.description = f"torch; attention: {prompts} for prompts, {decoding} for decoding, {latents} from latents"
        if self.groups_experts:
            self.description += "; experts: torch's grouped product"

    def describe(self, quantization: str) -> str:
        if quantization == "fp8":
            return f"{self.description}; fp8 weights {self._fp8}"
        return super().describe(quantization)

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if (
            self._deep_gemm is not None
            and isinstance(weight, Fp8Weight)
            and (scales := block_scales(weight)) is not None
        ):
            return DeepGemmLinear(self._deep_gemm, weight, scales, bias)
        return super().linear(weight, bias)

    def ragged(self, width: int) -> bool:
        return True

    def ragged_latent(self, row: int, rank: int) -> bool:
        return True

    def attend_latent(
        self, q: torch.Tensor, cache: LayerCache, group: DecodeGroup, rank: int, scale: float
    ) -> torch.Tensor:
        attend = self._attend_latent
        if self._flash_mla is not None and takes(q.shape[2], rank, cache.block_size, q.dtype):
            attend = self._flash_mla
        return attend(
            q,
            cache.slots,
            group.block_ids.view(len(q), -1),
            group.lengths,
            block_size=cache.block_size,
            rank=rank,
            scale=scale,
        )

    def attend_cached(
        self, q: torch.Tensor, cache: LayerCache, group: DecodeGroup, kv_heads: int, width: int
    ) -> torch.Tensor:
        return self._attend_paged(
            q,
            cache.slots,
            group.block_ids.view(len(q), -1),
            group.lengths,
            block_size=cache.block_size,
            kv_heads=kv_heads,
            width=width,
        )

    def attend_prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None = None,
    ) -> torch.Tensor:
        width = q.shape[3]
        if self._flash is None or q.dtype == torch.float32 or width != v.shape[3] or width > _WIDEST_HEAD:
            return super().attend_prefill(q, k, v, mask, scale)
        # Its causal mask ends at the last query and the last key, whatever their numbers: a chunk's is the same.
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: torch.Tensor = self._flash(q, k, v, softmax_scale=scale, causal=True)
        return out.reshape(q.shape[1], -1)
