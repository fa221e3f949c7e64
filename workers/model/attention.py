"""Grouped-query attention with a paged cache (Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245).

The cache's row is the token's rotated keys beside its values, K * D each, exactly as they lie in the output of the
fused projection, so that one copy stores and one copy fetches both.
"""

from __future__ import annotations

import torch

from workers.cache import LayerCache
from workers.kernels.seam import Kernels, Linear, Norm
from workers.model.parallel_linear import ResidualLinear
from workers.step import DecodeGroup, PrefillChunk, StepTensors

__all__ = ["GroupedQueryAttention", "QKNorm"]


class QKNorm:
    """An RMS norm of each query and key head, with one weight for queries and one for keys (qwen3)."""

    __slots__ = ("_norm", "_weight")

    def __init__(self, q: torch.Tensor, k: torch.Tensor, heads: int, kv_heads: int, epsilon: float, kernels: Kernels):
        self._weight = torch.cat((q.expand(heads, -1), k.expand(kv_heads, -1)))
        self._norm = kernels.rms_norm(torch.ones_like(q), epsilon)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises x [T, H + K, D]."""
        tokens, heads, width = x.shape
        return self._norm(x.reshape(-1, width)).view(tokens, heads, width) * self._weight


class GroupedQueryAttention:
    """One layer's attention block: `x + attention(norm(x))`.

    `num_heads` and `num_kv_heads` are this rank's; `cache_row` is what it keeps of a token.
    """

    __slots__ = (
        "_kernels",
        "_key_end",
        "_kv_heads",
        "_norm",
        "_out",
        "_qk_norm",
        "_qkv",
        "_query_end",
        "_width",
        "cache_row",
        "ragged",
    )

    def __init__(
        self,
        *,
        norm: Norm,
        qkv: Linear,
        qk_norm: QKNorm | None,
        out: ResidualLinear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernels: Kernels,
    ) -> None:
        self._norm = norm
        self._qkv = qkv
        self._qk_norm = qk_norm
        self._out = out
        self._kv_heads = num_kv_heads
        self._width = head_dim
        self._query_end = num_heads * head_dim
        self._key_end = (num_heads + num_kv_heads) * head_dim
        self._kernels = kernels
        self.cache_row = 2 * num_kv_heads * head_dim
        self.ragged = kernels.ragged(head_dim)

    def __call__(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], step: StepTensors, cache: LayerCache
    ) -> torch.Tensor:
        """x [T, hidden] in fp32; `rotation` are the rotary rows of the step's positions."""
        qkv = self._qkv(self._norm(x))
        rotated = qkv[:, : self._key_end].view(len(qkv), -1, self._width)
        if self._qk_norm is not None:
            rotated.copy_(self._qk_norm(rotated))
        self._kernels.rotate_(rotated, *rotation)
        cache.write(step.slots, qkv[:, self._query_end :])
        parts = [self._decode(qkv, group, cache) for group in step.decode]
        parts += [self._prefill(qkv[chunk.start : chunk.stop], chunk, cache) for chunk in step.prefill]
        return self._out.onto(x, parts[0] if len(parts) == 1 else torch.cat(parts))

    def _decode(self, qkv: torch.Tensor, group: DecodeGroup, cache: LayerCache) -> torch.Tensor:
        q = qkv[group.start : group.stop, : self._query_end]
        return self._kernels.attend_cached(q, cache, group, self._kv_heads, self._width)

    def _prefill(self, qkv: torch.Tensor, chunk: PrefillChunk, cache: LayerCache) -> torch.Tensor:
        if chunk.block_ids is None:
            kept = qkv[:, self._query_end :]
        else:
            kept = cache.read(chunk.block_ids)[: chunk.context]
        q = self._heads_first(qkv[:, : self._query_end])
        k, v = (self._heads_first(part) for part in kept.chunk(2, dim=-1))
        return self._kernels.attend_prefill(q, k, v, chunk.mask)

    def _heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, D] of rows [T, heads * D]."""
        return x.view(len(x), -1, self._width).transpose(0, 1).unsqueeze(0)
