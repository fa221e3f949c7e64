"""A model in the planner's numbers: what each part of its weights takes in the form in which it will be held."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.models.folder import ModelFacts
from scheduler.planner.shape import LayerShape, ModelShape
from workers.model.config import ModelConfig
from workers.model.layer_split import layer_costs
from workers.model.moe_sharding import expert_parameters
from workers.model.parameters import Parameter
from workers.model.shard import Shard
from workers.model.sharding import layer_parameters, tensor_sizes

__all__ = ["DTYPE_BYTES", "model_shape", "step_bytes"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FULL_PRECISION_BYTES = 4
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Form:
    """As `workers.weights.form` counts, which needs torch for it."""

    item_bytes: int
    quantization: str
    block_columns: int

    def of(self, parameters: Iterable[Parameter]) -> int:
        return sum(map(self._held, parameters))

    def _held(self, parameter: Parameter) -> int:
        items = math.prod(parameter.shape)
        if not parameter.quantizable or self.quantization == "none":
            return items * (_FULL_PRECISION_BYTES if parameter.full_precision else self.item_bytes)
        scales = parameter.shape[0]
        if self.quantization == "fp8":
            scales *= -(-parameter.shape[1] // self.block_columns)
        return items + scales * _SCALE_BYTES


def model_shape(model: ModelFacts, *, dtype: str, quantization: str, packs_head: bool) -> ModelShape:
    """With weights in `dtype`, or quantized; `packs_head` where the kernels keep the head in two layouts."""
    config, item_bytes = model.config, DTYPE_BYTES[dtype]
    form = _Form(item_bytes, quantization, config.quantization.columns if config.quantization else 1)
    vocabulary = config.vocab_size * config.hidden_size
    return ModelShape(
        name=config.model_type,
        layers=_layers(config, form) if config.native else _adopted_layers(model, item_bytes),
        embedding_bytes=vocabulary * item_bytes if config.native else 0,
        head_bytes=vocabulary * item_bytes if config.native else 0,
        packed_head_bytes=vocabulary * item_bytes if packs_head and config.native else 0,
        tied=config.tie_word_embeddings,
        head_cost=vocabulary,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        tensor_sizes=tensor_sizes(config),
        num_experts=0 if config.moe is None else config.moe.gate.num_experts,
        cache_whole_bytes=0 if config.mla is None else config.mla.cache_row * item_bytes,
        cache_divided_bytes=2 * config.num_kv_heads * config.head_dim * item_bytes if config.mla is None else 0,
        most_stages=config.num_layers if config.native else 1,
        loaded_whole=not config.native,
    )


def step_bytes(config: ModelConfig, *, dtype: str, max_batch_tokens: int, max_batch_size: int) -> int:
    """About what one step needs beside weights and cache: hidden states, the widest layer's, and logits."""
    widest = 3 * config.intermediate_size
    if config.moe is not None:
        copies = config.moe.gate.top_k
        widest = max(widest, copies * (2 * config.hidden_size + 3 * config.moe.expert_size))
    tokens = max_batch_tokens * (6 * config.hidden_size + widest) * DTYPE_BYTES[dtype]
    return tokens + max_batch_size * config.vocab_size * 3 * _FULL_PRECISION_BYTES


def _layers(config: ModelConfig, form: _Form) -> tuple[LayerShape, ...]:
    costs = layer_costs(config)
    known: dict[bool, LayerShape] = {}
    found = []
    for layer in range(config.num_layers):
        has_experts = config.moe is not None and config.moe.has_experts(layer)
        if has_experts not in known:
            known[has_experts] = _layer(config, form, layer, has_experts, costs[layer])
        found.append(known[has_experts])
    return tuple(found)


def _layer(config: ModelConfig, form: _Form, layer: int, has_experts: bool, cost: int) -> LayerShape:
    """What tensor ranks divide shows in what is left of it for each of many."""
    alone = Shard(config, 0, 1)
    whole = form.of(layer_parameters(alone, layer))
    divided, size = 0, max(tensor_sizes(config))
    if size > 1:
        part = form.of(layer_parameters(Shard(config, 0, size), layer))
        divided = (whole - part) * size // (size - 1)
    expert = form.of(expert_parameters(alone, "", "", 0)) if has_experts else 0
    return LayerShape(whole_bytes=whole - divided, divided_bytes=divided, expert_bytes=expert, cost=cost)


def _adopted_layers(model: ModelFacts, item_bytes: int) -> tuple[LayerShape, ...]:
    """Of a model whose inside we do not know: all layers alike, and what is before and behind them on every rank."""
    config = model.config
    ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    items = max(ends, model.weight_bytes // DTYPE_BYTES.get(config.dtype, 2))
    each = (items - ends) * item_bytes // config.num_layers
    first = LayerShape(whole_bytes=ends * item_bytes, divided_bytes=each, cost=1)
    return (first, *(LayerShape(whole_bytes=0, divided_bytes=each, cost=1),) * (config.num_layers - 1))
