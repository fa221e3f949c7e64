"""Builds a layer's latent attention."""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.kernels.quantized import Weight, row_tensors
from workers.model.mla import LatentAttention, LatentQuery, prefers_expanded, softmax_scale
from workers.model.mla_config import MLAConfig
from workers.model.parts import Parts

__all__ = ["build_latent_attention"]

# The latents' norms have this epsilon whatever the configuration says, in DeepSeek's code and in transformers'.
_EPSILON = 1e-6


def build_latent_attention(
    parts: Parts, layer: str, *, expands: Callable[[MLAConfig, int, int], bool] | None = None
) -> LatentAttention:
    """`expands` decides how a chunk is computed, from its tokens and its context: by default by cost, or as a token
    that decodes where the kernels want one form for all.
    """
    if expands is None:
        expands = _never if parts.kernels.one_form else prefers_expanded
    config, num_heads = parts.shard.config, parts.shard.num_heads
    mla = config.mla
    assert mla is not None
    name = f"{layer}.attention"
    norm = parts.norm(f"{name}.norm")
    weight, bias = parts.weight(f"{name}.inputs.weight"), parts.maybe(f"{name}.inputs.bias")
    num_rows = len(row_tensors(weight)[0])
    if bias is not None:  # queries that come straight from the hidden state have none
        bias = torch.cat((bias.new_zeros(num_rows - len(bias)), bias))
    rotated = [(num_rows - mla.rope_dim, num_rows)]
    query = None
    if mla.q_rank is None:
        rotated += _rotated_rows(mla, num_heads)
    else:
        query_norm = parts.norm(f"{name}.q_norm", _EPSILON)
        query_up = parts.weight(f"{name}.q.weight")
        _halve(mla, query_up, _rotated_rows(mla, num_heads))
        query = LatentQuery(query_norm, parts.kernels.linear(query_up, None))
    _halve(mla, weight, rotated)
    if bias is not None:
        _halve(mla, bias, rotated)
    latent_norm = parts.norm(f"{name}.latent_norm", _EPSILON)
    per_head = parts.need(f"{name}.kv_b.weight").view(num_heads, mla.nope_dim + mla.v_dim, mla.kv_rank)
    return LatentAttention(
        mla=mla,
        scale=softmax_scale(mla, config.rope),
        norm=norm,
        inputs=parts.kernels.linear(weight, bias),
        query=query,
        latent_norm=latent_norm,
        w_uk=per_head[:, : mla.nope_dim].contiguous(),
        w_uv=per_head[:, mla.nope_dim :].contiguous(),
        out=parts.residual(f"{name}.out"),
        kernels=parts.kernels,
        expands=expands,
    )


def _never(mla: MLAConfig, num_tokens: int, context: int) -> bool:
    return False


def _rotated_rows(mla: MLAConfig, num_heads: int) -> list[tuple[int, int]]:
    return [(head * mla.qk_dim + mla.nope_dim, (head + 1) * mla.qk_dim) for head in range(num_heads)]


def _halve(mla: MLAConfig, weight: Weight, rotated: list[tuple[int, int]]) -> None:
    """Puts the even ones of each range of rows before the odd ones, in place.

    The rotation is then that of halves, which costs no reordering at run time. Queries and keys change alike, so their
    products stay.
    """
    if not mla.interleaved:
        return
    for tensor in row_tensors(weight):
        for first, last in rotated:
            rows = tensor[first:last]
            rows.copy_(torch.cat((rows[0::2], rows[1::2])))
