"""How a model is cut over the ranks of the tensor axis: which bytes of the checkpoint a rank needs.

Attention is cut by heads and the MLP by its inner width, so each block needs one all-reduce of its output. Embedding
and output head are cut by vocabulary: a rank reads its rows only, and tied weights share them. Looking up an embedding
is then exact (every rank but one adds zeros), and the head's logits are gathered to one rank. Which layers a pipeline
stage has is said in `layer_split.py`.

These files know shapes and names and nothing of tensors; `mla_sharding.py` and `moe_sharding.py` say the same of latent
attention and of experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from workers.model.config import ModelConfig
from workers.model.mla_sharding import mla_parameters
from workers.model.moe_sharding import moe_parameters, place_experts
from workers.model.other_config import NOTICE
from workers.model.parameters import Parameter, Piece, columns, stack, vector
from workers.model.shard import Shard
from workers.parallel.plan import ParallelPlan

__all__ = [
    "Parameter",
    "Piece",
    "Shard",
    "check_plan",
    "end_parameters",
    "layer_parameters",
    "place_experts",
    "shard_parameters",
    "tensor_sizes",
]

_EMBEDDING = "model.embed_tokens.weight"


def tensor_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Sizes of the tensor axis that the model can be cut over."""
    return tuple(
        size
        for size in range(1, config.num_kv_heads + 1)
        if config.num_heads % size == 0 and config.num_kv_heads % size == 0
    )


def check_plan(config: ModelConfig, plan: ParallelPlan) -> None:
    """Raises ValueError, naming the axis and the sizes that would work, where `plan` cannot cut this model."""
    if plan.pipeline > 1 and not config.native:
        raise ValueError(f"parallel.pipeline must be 1 for a {config.model_type} model, which {NOTICE}")
    if plan.pipeline > config.num_layers:
        raise ValueError(
            f"parallel.pipeline {plan.pipeline} exceeds the model's {config.num_layers} layers; "
            f"{config.num_layers} or less would work"
        )
    if config.moe is not None:
        place_experts(config.moe.gate.num_experts, plan)
    elif plan.redundant_experts:
        raise ValueError(f"parallel.redundant_experts must be 0: a {config.model_type} model has no experts")
    sizes = tensor_sizes(config)
    if plan.tensor not in sizes:
        heads = f"{config.num_heads} attention heads"
        if config.mla is None:
            heads += f" and {config.num_kv_heads} key-value heads"
        raise ValueError(
            f"parallel.tensor {plan.tensor} must divide the model's {heads}; sizes that work: "
            f"{', '.join(map(str, sizes))}"
        )


def shard_parameters(shard: Shard) -> dict[str, Parameter]:
    """Every parameter that the rank holds, by our name, in the order in which the model is built."""
    return {parameter.name: parameter for parameter in _parameters(shard)}


def layer_parameters(shard: Shard, layer: int) -> Iterator[Parameter]:
    """Those of one layer, whether or not it is of the shard's stage."""
    config = shard.config
    attention = _attention if config.mla is None else mla_parameters
    mlp = moe_parameters if config.moe is not None and config.moe.has_experts(layer) else _mlp
    yield from attention(shard, f"layers.{layer}", f"model.layers.{layer}")
    yield from mlp(shard, f"layers.{layer}", f"model.layers.{layer}")


def end_parameters(shard: Shard) -> Iterator[Parameter]:
    """Those behind the last layer. Tied weights are the embedding's, where that is of the same stage."""
    config = shard.config
    yield vector("norm", "model.norm.weight", config.hidden_size)
    if not config.tie_word_embeddings:
        yield _vocab(shard, "head", "lm_head.weight")
    elif not shard.is_first:
        yield _vocab(shard, "head", _EMBEDDING)


def _parameters(shard: Shard) -> Iterator[Parameter]:
    if shard.is_first:
        yield _vocab(shard, "embedding", _EMBEDDING)
    for layer in shard.layers:
        yield from layer_parameters(shard, layer)
    if shard.is_last:
        yield from end_parameters(shard)


def _attention(shard: Shard, ours: str, theirs: str) -> Iterator[Parameter]:
    config = shard.config
    yield vector(f"{ours}.attention.norm", f"{theirs}.input_layernorm.weight", config.hidden_size)
    heads = (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads), ("v_proj", config.num_kv_heads))
    outputs = [
        (f"{theirs}.self_attn.{name}", total * config.head_dim, shard.heads(total, config.head_dim))
        for name, total in heads
    ]
    yield stack(f"{ours}.attention.qkv.weight", outputs, config.hidden_size)
    if config.qkv_bias:
        yield stack(f"{ours}.attention.qkv.bias", outputs, None)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield vector(f"{ours}.attention.{name}", f"{theirs}.self_attn.{name}.weight", config.head_dim)
    inputs = shard.heads(config.num_heads, config.head_dim)
    output = f"{theirs}.self_attn.o_proj"
    yield columns(
        f"{ours}.attention.out.weight", output, config.hidden_size, config.num_heads * config.head_dim, inputs
    )
    if config.output_bias and shard.index == 0:  # the ranks' outputs are summed: one of them adds the bias
        yield vector(f"{ours}.attention.out.bias", f"{output}.bias", config.hidden_size)


def _mlp(shard: Shard, ours: str, theirs: str) -> Iterator[Parameter]:
    config = shard.config
    yield vector(f"{ours}.mlp.norm", f"{theirs}.post_attention_layernorm.weight", config.hidden_size)
    outputs = [
        (f"{theirs}.mlp.{name}", config.intermediate_size, shard.intermediate) for name in ("gate_proj", "up_proj")
    ]
    yield stack(f"{ours}.mlp.gate_up.weight", outputs, config.hidden_size)
    if config.mlp_bias:
        yield stack(f"{ours}.mlp.gate_up.bias", outputs, None)
    down = f"{theirs}.mlp.down_proj"
    yield columns(f"{ours}.mlp.down.weight", down, config.hidden_size, config.intermediate_size, shard.intermediate)
    if config.mlp_bias and shard.index == 0:
        yield vector(f"{ours}.mlp.down.bias", f"{down}.bias", config.hidden_size)


def _vocab(shard: Shard, name: str, tensor: str) -> Parameter:
    config = shard.config
    piece = Piece(tensor, (config.vocab_size, config.hidden_size), shard.vocab, (0, config.hidden_size))
    return Parameter(name, (shard.vocab_rows, config.hidden_size), (piece,))
