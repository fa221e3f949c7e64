"""Builds a rank's part of a model from its parameters, one after the other.

The order is that of `shard_parameters`. Each parameter is handed to the kernels as it comes and is not kept, so that
building needs the memory of the finished part and of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from workers.kernels.seam import Kernels
from workers.model.attention import GroupedQueryAttention, QKNorm
from workers.model.build_mla import build_latent_attention
from workers.model.build_moe import build_moe
from workers.model.decoder import Attention, Decoder, DecoderLayer
from workers.model.ends import Entrance, FromStage, LookUp, ToLogits, ToStage
from workers.model.head import head
from workers.model.mlp import GatedMLP
from workers.model.moe import MoE
from workers.model.parallel_linear import embedding
from workers.model.parts import Parts, Take
from workers.model.rope import rotary_table
from workers.model.sharding import Shard
from workers.model.shared_read_head import Neighbours
from workers.parallel.collectives import Collectives
from workers.parallel.dispatch import Dispatch
from workers.parallel.stages import OneStage, Stages

__all__ = ["build_decoder"]


def build_decoder(
    shard: Shard,
    take: Take,
    kernels: Kernels,
    tensor: Collectives,
    *,
    stages: Stages | None = None,
    dispatch: Dispatch[Any] | None,
    num_positions: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Decoder:
    """The model for positions up to `num_positions`; `dispatch` reaches its routed experts, where it has any."""
    config, parts = shard.config, Parts(shard, take, kernels, tensor)
    stages = stages or OneStage()
    table = parts.need("embedding") if shard.is_first else None
    entrance: Entrance = FromStage(stages, config.hidden_size, device)
    if table is not None:
        entrance = LookUp(embedding(table, shard.vocab[0], tensor))
    layers = {number: DecoderLayer(_attention(parts, number), _mlp(parts, number, dispatch)) for number in shard.layers}
    return Decoder(
        entrance=entrance,
        layers=layers,
        exit_=_to_logits(parts, table, _neighbours(layers)) if shard.is_last else ToStage(stages),
        rotary=rotary_table(config.rope, config.head_dim, num_positions, dtype=dtype, device=device),
    )


def _neighbours(layers: Mapping[int, DecoderLayer]) -> Neighbours | None:
    """Those over whom the experts are spread, as they are at any time."""
    last = [layer.mlp for layer in layers.values() if isinstance(layer.mlp, MoE)][-1:]
    return (lambda: last[0].dispatch.neighbours) if last else None


def _to_logits(parts: Parts, table: torch.Tensor | None, neighbours: Neighbours | None) -> ToLogits:
    """`table` is the embedding, where this stage has it."""
    config = parts.shard.config
    norm = parts.norm("norm")
    output = table if config.tie_word_embeddings and table is not None else parts.need("head")
    return ToLogits(
        norm,
        head(parts.kernels, parts.kernels.linear(output, None), output, config.vocab_size, parts.tensor, neighbours),
    )


def _attention(parts: Parts, layer: int) -> Attention:
    if parts.shard.config.mla is not None:
        return build_latent_attention(parts, f"layers.{layer}")
    shard, config = parts.shard, parts.shard.config
    name = f"layers.{layer}.attention"
    norm = parts.norm(f"{name}.norm")
    qkv = parts.linear(f"{name}.qkv")
    qk_norm = None
    if config.qk_norm:
        q, k = parts.need(f"{name}.q_norm"), parts.need(f"{name}.k_norm")
        qk_norm = QKNorm(q, k, shard.num_heads, shard.num_kv_heads, config.rms_norm_eps, parts.kernels)
    return GroupedQueryAttention(
        norm=norm,
        qkv=qkv,
        qk_norm=qk_norm,
        out=parts.residual(f"{name}.out"),
        num_heads=shard.num_heads,
        num_kv_heads=shard.num_kv_heads,
        head_dim=config.head_dim,
        kernels=parts.kernels,
    )


def _mlp(parts: Parts, layer: int, dispatch: Dispatch[Any] | None) -> Callable[[torch.Tensor], torch.Tensor]:
    moe = parts.shard.config.moe
    if moe is not None and moe.has_experts(layer):
        assert dispatch is not None
        return build_moe(parts, layer, dispatch)
    name = f"layers.{layer}.mlp"
    norm = parts.norm(f"{name}.norm")
    return GatedMLP(norm=norm, gate_up=parts.gated_linear(f"{name}.gate_up"), down=parts.residual(f"{name}.down"))
