"""What a checkpoint's config.json says, checked and in our words.

Ours: `llama`, `qwen2`, `qwen3`, `deepseek_v2`, `deepseek_v3`, and `kimi_k2`, which is a V3. Both ways of writing rotary
embeddings are read: `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5). Of any
other model only the sizes are read; it runs through transformers (`workers/autotp`).
This file needs no torch, so that configuration code may read a model's sizes cheaply.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workers.model.fields import Fields
from workers.model.mla_config import MLAConfig, read_mla
from workers.model.moe_config import MoEConfig, read_moe
from workers.model.other_config import read_other
from workers.model.quantization import BlockQuantization, read_quantization

__all__ = ["SUPPORTED", "ModelConfig", "RopeConfig", "read_config"]

SUPPORTED = ("llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "kimi_k2")
_DEEPSEEK = SUPPORTED[3:]
_DEFAULT_POSITIONS = {
    "llama": 2048,
    "qwen2": 32768,
    "qwen3": 32768,
    "deepseek_v2": 2048,
    "deepseek_v3": 4096,
    "kimi_k2": 4096,
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary embedding: `type` is "default", "linear", "llama3" or "yarn"; the rest matters only where it says so."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None: from factor (and mscale)
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and switches of a decoder.

    With `mla` the attention is latent: `head_dim` is what of a head is rotated, and there are as many kv heads as
    heads. `moe` says which layers have experts; `intermediate_size` is the inner width of the others. A model that is
    not `native` runs through transformers: of it the sizes and the dtype are known, and nothing else.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool  # with `mla`: of the projections to the latents
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head before the rotation
    dtype: str  # what the checkpoint says it was saved in
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    quantization: BlockQuantization | None = None
    native: bool = True

    @property
    def architecture(self) -> str:
        """In words, such as "llama, 30 layers of 576"."""
        return f"{self.model_type}, {self.num_layers} layers of {self.hidden_size}"


def read_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json.

    Raises ValueError naming the field at fault.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a model folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return parse_config(raw)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """The checked form of a parsed config.json; see `read_config`."""
    fields = Fields(raw)
    model_type = fields.text("model_type", "")
    if not model_type:
        raise ValueError("config.json: model_type is missing")
    if model_type not in SUPPORTED:
        return _other(fields)
    _refuse_what_is_not_built(fields)
    attention_bias = fields.flag("attention_bias", False)
    num_heads = fields.size("num_attention_heads")
    hidden_size = fields.size("hidden_size")
    # qwen3's own default is 128 whatever the hidden size
    head_dim = fields.size("head_dim", 128 if model_type == "qwen3" else max(1, hidden_size // num_heads))
    mla = moe = None
    if model_type in _DEEPSEEK:
        sigmoid = model_type != "deepseek_v2"
        mla = read_mla(fields, always_interleaved=not sigmoid)
        moe = read_moe(fields, sigmoid=sigmoid)
        head_dim = mla.rope_dim
    config = ModelConfig(
        model_type=model_type,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if mla else fields.size("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position_embeddings=fields.size("max_position_embeddings", _DEFAULT_POSITIONS[model_type]),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=model_type == "qwen2" or attention_bias,
        output_bias=model_type != "qwen2" and attention_bias,
        mlp_bias=model_type == "llama" and fields.flag("mlp_bias", False),
        qk_norm=model_type == "qwen3",
        dtype=fields.text("dtype", fields.text("torch_dtype", "float32")),
        mla=mla,
        moe=moe,
        quantization=read_quantization(fields),
    )
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {config.num_heads} must be a multiple of num_key_value_heads "
            f"{config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"config.json: head_dim must be even, not {config.head_dim}")
    return config


def _other(fields: Fields) -> ModelConfig:
    """A model that we have no code for."""
    sizes = read_other(fields)
    return ModelConfig(
        model_type=fields.text("model_type", ""),
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.max_position_embeddings,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype=fields.text("dtype", fields.text("torch_dtype", "float32")),
        native=False,
    )


def _refuse_what_is_not_built(fields: Fields) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"config.json: hidden_act {activation!r} is not supported; supported: silu")
    layer_types = fields.texts("layer_types")
    if fields.flag("use_sliding_window", False) and (not layer_types or "sliding_attention" in layer_types):
        raise ValueError("config.json: use_sliding_window is not supported; only full attention is")
    if fields.text("model_type", "") in _DEEPSEEK and fields.flag("mlp_bias", False):
        raise ValueError("config.json: mlp_bias is not supported for this architecture")


def _rope(fields: Fields) -> RopeConfig:
    rope = fields.section("rope_parameters") or fields.section("rope_scaling") or Fields({})
    name = rope.text("rope_type", rope.text("type", "default"))
    if name not in _ROPE_TYPES:
        raise ValueError(f"config.json: rope_type {name!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor {partial} is not supported; only 1.0 is")
    positions = fields.size("max_position_embeddings", 2048)
    original = rope.size("original_max_position_embeddings", fields.size("original_max_position_embeddings", positions))
    return RopeConfig(
        type=name,
        theta=rope.number("rope_theta", fields.number("rope_theta", 10000.0)),
        # some yarn checkpoints leave the factor to the ratio of the lengths
        factor=rope.number("factor", positions / original if name == "yarn" else 1.0 if name == "default" else None),
        original_max_position_embeddings=original,
        low_freq_factor=rope.number("low_freq_factor", None if name == "llama3" else 1.0),
        high_freq_factor=rope.number("high_freq_factor", None if name == "llama3" else 4.0),
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
