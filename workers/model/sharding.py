"""How a dense model is cut over the ranks of the tensor axis: sizes, and which bytes of the checkpoint a rank needs.

Attention is cut by heads and the MLP by its inner width, so each block needs one all-reduce of its output. Embedding
and output head are cut by vocabulary: a rank reads its rows only, and tied weights share them. Looking up an embedding
is then exact (every rank but one adds zeros), and the head's logits are gathered to one rank.

This file knows shapes and names and nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from workers.model.config import ModelConfig
from workers.parallel.plan import ParallelPlan

__all__ = ["Parameter", "Piece", "Shard", "check_plan", "shard_parameters", "tensor_sizes"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a checkpoint tensor: `rows` and `columns` are half-open ranges, columns None for a vector."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor, as the checkpoint must have it
    rows: tuple[int, int]
    columns: tuple[int, int] | None

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the cut model: its pieces stacked by rows, and rows of zeros up to `shape` behind them."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """The local sizes of one rank of the tensor axis."""

    config: ModelConfig
    index: int
    size: int

    @property
    def num_heads(self) -> int:
        return self.config.num_heads // self.size

    @property
    def num_kv_heads(self) -> int:
        return self.config.num_kv_heads // self.size

    @property
    def intermediate(self) -> tuple[int, int]:
        """This rank's part of the MLP's inner width; the parts may differ by one."""
        total = self.config.intermediate_size
        return total * self.index // self.size, total * (self.index + 1) // self.size

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary per rank, the same on all so that logits can be gathered."""
        return -(-self.config.vocab_size // self.size)

    @property
    def vocab(self) -> tuple[int, int]:
        """This rank's token ids; the last ranks may have fewer than `vocab_rows`."""
        total = self.config.vocab_size
        return min(total, self.vocab_rows * self.index), min(total, self.vocab_rows * (self.index + 1))


def tensor_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Sizes of the tensor axis that the model can be cut over."""
    return tuple(
        size
        for size in range(1, config.num_kv_heads + 1)
        if config.num_heads % size == 0 and config.num_kv_heads % size == 0
    )


def check_plan(config: ModelConfig, plan: ParallelPlan) -> None:
    """Raises ValueError, naming the axis and the sizes that would work, where `plan` cannot cut this model."""
    if plan.pipeline != 1:
        raise ValueError(f"parallel.pipeline must be 1 for {config.model_type} models, not {plan.pipeline}")
    if plan.redundant_experts:
        raise ValueError(f"parallel.redundant_experts must be 0: a {config.model_type} model has no experts")
    sizes = tensor_sizes(config)
    if plan.tensor not in sizes:
        raise ValueError(
            f"parallel.tensor {plan.tensor} must divide the model's {config.num_heads} attention heads and "
            f"{config.num_kv_heads} key-value heads; sizes that work: {', '.join(map(str, sizes))}"
        )


def shard_parameters(shard: Shard) -> dict[str, Parameter]:
    """Every parameter that the rank holds, by our name, in the order in which the model is built."""
    return {parameter.name: parameter for parameter in _parameters(shard)}


def _parameters(shard: Shard) -> Iterator[Parameter]:
    config = shard.config
    yield _vocab(shard, "embedding", "model.embed_tokens.weight")
    for layer in range(config.num_layers):
        yield from _attention(shard, f"layers.{layer}", f"model.layers.{layer}")
        yield from _mlp(shard, f"layers.{layer}", f"model.layers.{layer}")
    yield _vector("norm", "model.norm.weight", config.hidden_size)
    if not config.tie_word_embeddings:
        yield _vocab(shard, "head", "lm_head.weight")


def _attention(shard: Shard, ours: str, theirs: str) -> Iterator[Parameter]:
    config = shard.config
    yield _vector(f"{ours}.attention.norm", f"{theirs}.input_layernorm.weight", config.hidden_size)
    heads = (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads), ("v_proj", config.num_kv_heads))
    outputs = [
        (f"{theirs}.self_attn.{name}", total * config.head_dim, _even(total, shard, config.head_dim))
        for name, total in heads
    ]
    yield _stack(f"{ours}.attention.qkv.weight", outputs, config.hidden_size)
    if config.qkv_bias:
        yield _stack(f"{ours}.attention.qkv.bias", outputs, None)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield _vector(f"{ours}.attention.{name}", f"{theirs}.self_attn.{name}.weight", config.head_dim)
    inputs = _even(config.num_heads, shard, config.head_dim)
    output = f"{theirs}.self_attn.o_proj"
    yield _columns(
        f"{ours}.attention.out.weight", output, config.hidden_size, config.num_heads * config.head_dim, inputs
    )
    if config.output_bias and shard.index == 0:  # the ranks' outputs are summed: one of them adds the bias
        yield _vector(f"{ours}.attention.out.bias", f"{output}.bias", config.hidden_size)


def _mlp(shard: Shard, ours: str, theirs: str) -> Iterator[Parameter]:
    config = shard.config
    yield _vector(f"{ours}.mlp.norm", f"{theirs}.post_attention_layernorm.weight", config.hidden_size)
    outputs = [
        (f"{theirs}.mlp.{name}", config.intermediate_size, shard.intermediate) for name in ("gate_proj", "up_proj")
    ]
    yield _stack(f"{ours}.mlp.gate_up.weight", outputs, config.hidden_size)
    if config.mlp_bias:
        yield _stack(f"{ours}.mlp.gate_up.bias", outputs, None)
    down = f"{theirs}.mlp.down_proj"
    yield _columns(f"{ours}.mlp.down.weight", down, config.hidden_size, config.intermediate_size, shard.intermediate)
    if config.mlp_bias and shard.index == 0:
        yield _vector(f"{ours}.mlp.down.bias", f"{down}.bias", config.hidden_size)


def _even(total: int, shard: Shard, width: int) -> tuple[int, int]:
    """The rank's equal part of `total` things of `width` rows."""
    part = total // shard.size * width
    return part * shard.index, part * (shard.index + 1)


def _stack(name: str, outputs: list[tuple[str, int, tuple[int, int]]], width: int | None) -> Parameter:
    """Output slices of several projections (module, its outputs, our range), or of their biases, in one tensor."""
    suffix, tail = ("bias", ()) if width is None else ("weight", (width,))
    columns = None if width is None else (0, width)
    pieces = tuple(Piece(f"{module}.{suffix}", (total, *tail), rows, columns) for module, total, rows in outputs)
    return Parameter(name, (sum(piece.num_rows for piece in pieces), *tail), pieces)


def _columns(name: str, module: str, rows: int, width: int, columns: tuple[int, int]) -> Parameter:
    piece = Piece(f"{module}.weight", (rows, width), (0, rows), columns)
    return Parameter(name, (rows, columns[1] - columns[0]), (piece,))


def _vector(name: str, tensor: str, size: int) -> Parameter:
    return Parameter(name, (size,), (Piece(tensor, (size,), (0, size), None),))


def _vocab(shard: Shard, name: str, tensor: str) -> Parameter:
    config = shard.config
    piece = Piece(tensor, (config.vocab_size, config.hidden_size), shard.vocab, (0, config.hidden_size))
    return Parameter(name, (shard.vocab_rows, config.hidden_size), (piece,))
