"""Grouped-query attention with a paged cache (Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245).

The cache's row is the token's rotated keys beside its values, K * D each, exactly as they lie in the output of the
fused projection, so that one copy stores and one copy fetches both.
"""

from __future__ import annotations

import torch

from workers.cache import LayerCache
from workers.inputs import StepTensors
from workers.kernels.seam import Kernels, Linear
from workers.model.norm import RMSNorm
from workers.model.parallel_linear import ResidualLinear

__all__ = ["GroupedQueryAttention", "QKNorm"]


class QKNorm:
    """An RMS norm of each query and key head, with one weight for queries and one for keys (qwen3)."""

    __slots__ = ("_epsilon", "_kernels", "_ones", "_weight")

    def __init__(self, q: torch.Tensor, k: torch.Tensor, heads: int, kv_heads: int, epsilon: float, kernels: Kernels):
        self._weight = torch.cat((q.expand(heads, -1), k.expand(kv_heads, -1)))
        self._ones = torch.ones_like(q)
        self._epsilon = epsilon
        self._kernels = kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises x [T, H + K, D]."""
        return self._kernels.rms_norm(x, self._ones, self._epsilon).mul_(self._weight)


class GroupedQueryAttention:
    """One layer's attention block: `x + attention(norm(x))`.

    `num_heads` and `num_kv_heads` are this rank's; `cache_row` is what it keeps of a token.
    """

    __slots__ = ("_heads", "_kernels", "_kv_heads", "_norm", "_out", "_qk_norm", "_qkv", "_width", "cache_row")

    def __init__(
        self,
        *,
        norm: RMSNorm,
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
        self._heads = num_heads
        self._kv_heads = num_kv_heads
        self._width = head_dim
        self._kernels = kernels
        self.cache_row = 2 * num_kv_heads * head_dim

    def __call__(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], step: StepTensors, cache: LayerCache
    ) -> torch.Tensor:
        """x [T, hidden]; `rotation` are the rotary rows of the step's positions."""
        qkv = self._qkv(self._norm(x))
        heads = qkv.view(len(qkv), -1, self._width)
        rotated = heads[:, : self._heads + self._kv_heads]
        if self._qk_norm is not None:
            rotated.copy_(self._qk_norm(rotated))
        self._kernels.rotate_(rotated, *rotation)
        cache.write(step.slots, qkv[:, self._heads * self._width :])
        return self._out.plus(self._attend(heads, step, cache), x)

    def _attend(self, heads: torch.Tensor, step: StepTensors, cache: LayerCache) -> torch.Tensor:
        parts = [self._decode(heads[g.start : g.stop], g.block_ids, g.context, g.mask, cache) for g in step.decode]
        for chunk in step.prefill:
            rows = heads[chunk.start : chunk.stop]
            if chunk.block_ids is None:
                k, v = rows[:, self._heads : self._heads + self._kv_heads], rows[:, self._heads + self._kv_heads :]
            else:
                k, v = self._keys_values(cache.read(chunk.block_ids)[: chunk.context])
            parts.append(self._kernels.attend_prefill(rows[:, : self._heads], k, v, chunk.mask))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self, rows: torch.Tensor, block_ids: torch.Tensor, context: int, mask: torch.Tensor | None, cache: LayerCache
    ) -> torch.Tensor:
        k, v = self._keys_values(cache.read(block_ids).view(len(rows), -1, self.cache_row)[:, :context])
        return self._kernels.attend_decode(rows[:, : self._heads], k, v, mask)

    def _keys_values(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., K, D] of cache rows [..., 2 * K * D]."""
        both = kept.view(*kept.shape[:-1], 2, self._kv_heads, self._width)
        return both.select(-3, 0), both.select(-3, 1)
