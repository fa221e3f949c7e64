"""Multi-head latent attention with a paged cache (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache's row is the token's normalised latent beside its rotated key, both shared by all heads. From it attention
is computed in one of two ways, equal but for rounding:

- expanded: every head's keys and values are made from the latents of the context, then attended to as usual;
- absorbed: the query goes through the key projection instead, `q . (W_UK c) = (W_UK^T q) . c`, attends to the
  latents themselves as the one key and value of all heads, and what comes out goes through the value projection.

Expanding costs as much as the context is long, absorbing as much as there are queries: `prefers_expanded`.
Shape suffixes: T tokens, C context, H heads, N and R a head's width without and with rotation, L latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from workers.cache import LayerCache
from workers.kernels.seam import Kernels, Linear, Norm
from workers.model.config import RopeConfig
from workers.model.mla_config import MLAConfig
from workers.model.parallel_linear import ResidualLinear
from workers.step import DecodeGroup, StepTensors

__all__ = ["LatentAttention", "LatentQuery", "prefers_expanded", "softmax_scale"]

# Expanded keys and values of more than this many bytes are made for some heads at a time.
_EXPANDED_BYTES = 256 << 20


def prefers_expanded(mla: MLAConfig, num_tokens: int, context: int) -> bool:
    """Whether a chunk of `num_tokens` that attends to `context` tokens takes fewer multiply-adds expanded.

    Per head: making keys and values of the context, or putting queries and results through the same projections;
    then scores and sums over heads of `qk_dim` and `v_dim`, or over cache rows and latents.
    """
    projections = mla.kv_rank * (mla.nope_dim + mla.v_dim)
    expanded = context * projections + num_tokens * context * (mla.qk_dim + mla.v_dim)
    absorbed = num_tokens * projections + num_tokens * context * (mla.cache_row + mla.kv_rank)
    return expanded < absorbed


def softmax_scale(mla: MLAConfig, rope: RopeConfig) -> float:
    """`1 / sqrt(qk_dim)`, sharpened for a context that YaRN stretched (transformers' `yarn_apply_mscale`)."""
    scale = 1.0 / math.sqrt(mla.qk_dim)
    if rope.type != "default" and rope.mscale_all_dim and rope.factor > 1:
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    return scale


class LatentQuery:
    """Queries from their latent."""

    __slots__ = ("_norm", "_up")

    def __init__(self, norm: Norm, up: Linear) -> None:
        self._norm = norm
        self._up = up

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        return self._up(self._norm(latent))


class LatentAttention:
    """One layer's attention block: `x + attention(norm(x))`.

    `inputs` gives the queries of this rank's heads or, with `query`, their latent, and behind them the row that is
    kept. `w_uk` [H, N, L] and `w_uv` [H, V, L] make a head's keys and values. Rotated dimensions lie in halves.
    """

    __slots__ = (
        "_expands",
        "_inputs",
        "_kernels",
        "_latent_norm",
        "_mla",
        "_norm",
        "_out",
        "_query",
        "_scale",
        "_w_uk",
        "_w_uv",
        "cache_row",
        "ragged",
    )

    def __init__(
        self,
        *,
        mla: MLAConfig,
        scale: float,
        norm: Norm,
        inputs: Linear,
        query: LatentQuery | None,
        latent_norm: Norm,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        out: ResidualLinear,
        kernels: Kernels,
        expands: Callable[[MLAConfig, int, int], bool],
    ) -> None:
        self._mla = mla
        self._scale = scale
        self._norm = norm
        self._inputs = inputs
        self._query = query
        self._latent_norm = latent_norm
        self._w_uk = w_uk
        self._w_uv = w_uv
        self._out = out
        self._kernels = kernels
        self._expands = expands
        self.cache_row = mla.cache_row
        self.ragged = kernels.ragged_latent(mla.cache_row, mla.kv_rank)

    def __call__(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], step: StepTensors, cache: LayerCache
    ) -> torch.Tensor:
        """x [T, hidden] in fp32; `rotation` are the rotary rows of the step's positions."""
        both = self._inputs(self._norm(x))
        q, rows = both[:, : -self.cache_row], both[:, -self.cache_row :]
        if self._query is not None:
            q = self._query(q)
        q_THD = q.view(len(q), -1, self._mla.qk_dim)
        latent, key = rows[:, : self._mla.kv_rank], rows[:, self._mla.kv_rank :]
        latent.copy_(self._latent_norm(latent))
        self._kernels.rotate_(q_THD[..., self._mla.nope_dim :], *rotation)
        self._kernels.rotate_(key.unsqueeze(1), *rotation)
        cache.write(step.slots, rows)
        parts = [self._decode(q_THD[: step.decode[-1].stop], step.decode, cache)] if step.decode else []
        for chunk in step.prefill:
            kept = rows[chunk.start : chunk.stop]
            if chunk.block_ids is not None:
                kept = cache.read(chunk.block_ids)[: chunk.context]
            attend = self._expanded if self._expands(self._mla, chunk.stop - chunk.start, len(kept)) else self._absorbed
            parts.append(attend(q_THD[chunk.start : chunk.stop], kept, chunk.mask))
        return self._out.onto(x, parts[0] if len(parts) == 1 else torch.cat(parts))

    def _decode(self, q_THD: torch.Tensor, groups: tuple[DecodeGroup, ...], cache: LayerCache) -> torch.Tensor:
        q = self._absorb(q_THD)
        parts = [
            self._kernels.attend_latent(q[group.start : group.stop], cache, group, self._mla.kv_rank, self._scale)
            for group in groups
        ]
        return self._raise(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _absorbed(self, q_THD: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, kept = _heads_first(self._absorb(q_THD)), _heads_first(kept.unsqueeze(1))
        sums = self._kernels.attend_prefill(q, kept, kept, mask, self._scale)
        return self._raise(sums.view(len(sums), -1, self.cache_row)[..., : self._mla.kv_rank])

    def _absorb(self, q_THD: torch.Tensor) -> torch.Tensor:
        """Queries that attend to cache rows [T, H, L + R]."""
        nope = self._mla.nope_dim
        q_THL = self._kernels.per_head(q_THD[..., :nope], self._w_uk)
        return torch.cat((q_THL, q_THD[..., nope:]), dim=-1)

    def _raise(self, sums_THL: torch.Tensor) -> torch.Tensor:
        """Values [T, H * V] of the heads' sums over latents."""
        return self._kernels.per_head(sums_THL, self._w_uv.transpose(1, 2)).reshape(len(sums_THL), -1)

    def _expanded(self, q_THD: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        num_heads = len(self._w_uk)
        head_bytes = len(kept) * (self._mla.qk_dim + self._mla.v_dim) * kept.itemsize
        step = max(1, min(num_heads, _EXPANDED_BYTES // head_bytes))
        parts = []
        for first in range(0, num_heads, step):
            heads = slice(first, first + step)
            k, v = self._keys_values(kept, heads)
            parts.append(self._kernels.attend_prefill(_heads_first(q_THD[:, heads]), k, v, mask, self._scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _keys_values(self, kept: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [1, H, C, N + R] and values [1, H, C, V] of some heads from cache rows [C, L + R]."""
        mla, context = self._mla, len(kept)
        latent, key = kept[:, : mla.kv_rank], kept[:, mla.kv_rank :]
        w_uk, w_uv = self._w_uk[heads], self._w_uv[heads]
        k = kept.new_empty(context, len(w_uk), mla.qk_dim)
        k[..., : mla.nope_dim] = F.linear(latent, w_uk.flatten(0, 1)).view(context, -1, mla.nope_dim)
        k[..., mla.nope_dim :] = key.unsqueeze(1)
        v = F.linear(latent, w_uv.flatten(0, 1)).view(context, -1, mla.v_dim)
        return _heads_first(k), _heads_first(v)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] of [T, H, D]."""
    return x.transpose(0, 1).unsqueeze(0)
