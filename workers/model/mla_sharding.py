"""How latent attention is cut: by heads, with the latents, which all heads share, on every rank.

The projections from the hidden state to the latents (and without `q_lora_rank` to the queries) are one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

from workers.model.parameters import Output, Parameter, columns, stack, vector
from workers.model.shard import Shard

__all__ = ["mla_parameters"]


def mla_parameters(shard: Shard, ours: str, theirs: str) -> Iterator[Parameter]:
    """Of the layer that is named `ours` here and `theirs` in the checkpoint."""
    config, mla = shard.config, shard.config.mla
    assert mla is not None
    hidden, heads = config.hidden_size, config.num_heads
    ours, module = f"{ours}.attention", f"{theirs}.self_attn"
    yield vector(f"{ours}.norm", f"{theirs}.input_layernorm.weight", hidden)
    latent: Output = (f"{module}.kv_a_proj_with_mqa", mla.cache_row, (0, mla.cache_row))
    if mla.q_rank is None:
        q: Output = (f"{module}.q_proj", heads * mla.qk_dim, shard.heads(heads, mla.qk_dim))
        yield stack(f"{ours}.inputs.weight", [q, latent], hidden)
        biased = [latent]  # the queries have none
    else:
        q_latent: Output = (f"{module}.q_a_proj", mla.q_rank, (0, mla.q_rank))
        q = (f"{module}.q_b_proj", heads * mla.qk_dim, shard.heads(heads, mla.qk_dim))
        yield stack(f"{ours}.inputs.weight", [q_latent, latent], hidden)
        yield vector(f"{ours}.q_norm", f"{module}.q_a_layernorm.weight", mla.q_rank)
        yield stack(f"{ours}.q.weight", [q], mla.q_rank)
        biased = [q_latent, latent]
    if config.qkv_bias:
        yield stack(f"{ours}.inputs.bias", biased, None)
    yield vector(f"{ours}.latent_norm", f"{module}.kv_a_layernorm.weight", mla.kv_rank)
    width = mla.nope_dim + mla.v_dim
    up: Output = (f"{module}.kv_b_proj", heads * width, shard.heads(heads, width))
    yield stack(f"{ours}.kv_b.weight", [up], mla.kv_rank, quantizable=False)  # is multiplied from both sides
    out = f"{module}.o_proj"
    yield columns(f"{ours}.out.weight", out, hidden, heads * mla.v_dim, shard.heads(heads, mla.v_dim))
    if config.output_bias and shard.index == 0:  # the ranks' outputs are summed: one of them adds the bias
        yield vector(f"{ours}.out.bias", f"{out}.bias", hidden)
