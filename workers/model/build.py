"""Builds a rank's part of a dense model from its parameters, one after the other.

The order is that of `shard_parameters`. Each parameter is handed to the kernels as it comes and is not kept, so that
building needs the memory of the finished part and of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.kernels.seam import Kernels, Linear, Norm
from workers.model.attention import GroupedQueryAttention, QKNorm
from workers.model.decoder import Decoder, DecoderLayer
from workers.model.mlp import GatedMLP
from workers.model.parallel_linear import ResidualLinear, embedding, head, residual_linear
from workers.model.rope import rotary_table
from workers.model.sharding import Shard
from workers.parallel.collectives import Collectives

__all__ = ["build_decoder"]

# A parameter of the shard by name, on the model's device; None where the shard has none of that name.
Take = Callable[[str], torch.Tensor | None]


def build_decoder(
    shard: Shard,
    take: Take,
    kernels: Kernels,
    tensor: Collectives,
    *,
    num_positions: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Decoder:
    """The model for positions up to `num_positions`."""
    return _Builder(shard, take, kernels, tensor).decoder(num_positions, dtype, device)


class _Builder:
    def __init__(self, shard: Shard, take: Take, kernels: Kernels, tensor: Collectives) -> None:
        self._shard = shard
        self._config = shard.config
        self._take = take
        self._kernels = kernels
        self._tensor = tensor

    def decoder(self, num_positions: int, dtype: torch.dtype, device: torch.device) -> Decoder:
        config = self._config
        table = self._need("embedding")
        layers = [
            DecoderLayer(self._attention(f"layers.{n}"), self._mlp(f"layers.{n}")) for n in range(config.num_layers)
        ]
        norm = self._norm("norm")
        output = table if config.tie_word_embeddings else self._need("head")
        return Decoder(
            embedding=embedding(table, self._shard.vocab[0], self._tensor),
            layers=layers,
            norm=norm,
            head=head(self._kernels.linear(output, None), config.vocab_size, self._tensor),
            rotary=rotary_table(config.rope, config.head_dim, num_positions, dtype=dtype, device=device),
        )

    def _attention(self, layer: str) -> GroupedQueryAttention:
        shard, config = self._shard, self._config
        name = f"{layer}.attention"
        norm = self._norm(f"{name}.norm")
        qkv = self._linear(f"{name}.qkv")
        qk_norm = None
        if config.qk_norm:
            q, k = self._need(f"{name}.q_norm"), self._need(f"{name}.k_norm")
            qk_norm = QKNorm(q, k, shard.num_heads, shard.num_kv_heads, config.rms_norm_eps, self._kernels)
        return GroupedQueryAttention(
            norm=norm,
            qkv=qkv,
            qk_norm=qk_norm,
            out=self._residual(f"{name}.out"),
            num_heads=shard.num_heads,
            num_kv_heads=shard.num_kv_heads,
            head_dim=config.head_dim,
            kernels=self._kernels,
        )

    def _mlp(self, layer: str) -> GatedMLP:
        norm = self._norm(f"{layer}.mlp.norm")
        gate_up = f"{layer}.mlp.gate_up"
        gated = self._kernels.gated_linear(self._need(f"{gate_up}.weight"), self._take(f"{gate_up}.bias"))
        return GatedMLP(norm=norm, gate_up=gated, down=self._residual(f"{layer}.mlp.down"))

    def _linear(self, name: str) -> Linear:
        return self._kernels.linear(self._need(f"{name}.weight"), self._take(f"{name}.bias"))

    def _residual(self, name: str) -> ResidualLinear:
        return residual_linear(self._linear(name), self._tensor)

    def _norm(self, name: str) -> Norm:
        return self._kernels.rms_norm(self._need(name), self._config.rms_norm_eps)

    def _need(self, name: str) -> torch.Tensor:
        tensor = self._take(name)
        assert tensor is not None, name
        return tensor
