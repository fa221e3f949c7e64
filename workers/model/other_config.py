"""The sizes of a model that we have no code for, under whichever names its config.json gives them.

This is read without transformers, so that configuration code may plan an engine and refuse what cannot work; the rest
is found out when the model is loaded (`workers/autotp`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from workers.model.fields import Fields

__all__ = ["NOTICE", "OtherSizes", "read_other", "require_transformers"]

NOTICE = "runs through transformers and DeepSpeed AutoTP: slower than a native model"

_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
}
_OTHER_SENSES = ("vision_config", "audio_config", "image_token_id", "audio_token_id")
_RECURRENT = ("mamba", "rwkv", "xlstm", "recurrent", "jamba", "zamba", "bamba", "falcon_h1", "nemotron_h", "lfm2")
# Whatever else a layer does with its past, such as a state-space recurrence, our cache does not keep.
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherSizes:
    """See `workers.model.config.ModelConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int


def read_other(fields: Fields) -> OtherSizes:
    """Raises ValueError naming the field at fault, or what such a model has that is not supported."""
    _refuse_what_cannot_work(fields)
    hidden_size = _size(fields, "hidden_size")
    num_heads = _size(fields, "num_attention_heads")
    return OtherSizes(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(fields, "intermediate_size", 4 * hidden_size),
        num_layers=_size(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=1 if fields.flag("multi_query", False) else _size(fields, "num_key_value_heads", num_heads),
        head_dim=fields.size("head_dim", max(1, hidden_size // num_heads)),
        max_position_embeddings=_size(fields, "max_position_embeddings"),
    )


def require_transformers(model_type: str) -> None:
    """Raises ValueError where it is not installed. Does not import it."""
    if find_spec("transformers") is None:
        raise ValueError(
            f"a {model_type} model {NOTICE}, and transformers is not installed: pip install 'shoal[transformers]'"
        )


def _refuse_what_cannot_work(fields: Fields) -> None:
    model_type = fields.text("model_type", "")
    if any(name in model_type for name in _RECURRENT):
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported: the state of its recurrent layers has no place "
            "in a paged cache"
        )
    if fields.flag("is_encoder_decoder", False):
        raise ValueError(f"config.json: is_encoder_decoder: {model_type} is no decoder alone, which is what is served")
    for name in _OTHER_SENSES:
        if fields.present(name):
            raise ValueError(f"config.json: {name}: {model_type} takes more than text, which is what is served")
    architectures = fields.texts("architectures")
    if architectures and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise ValueError(f"config.json: architectures: {', '.join(architectures)} is no causal language model")
    for name in fields.texts("layer_types"):
        if name not in _LAYER_TYPES:
            raise ValueError(
                f"config.json: layer_types: {name!r} is not supported; supported: {', '.join(_LAYER_TYPES)}"
            )
    if fields.present("quantization_config"):
        raise ValueError(
            f"config.json: quantization_config is not supported for {model_type}; serve the unquantized checkpoint"
        )


def _size(fields: Fields, name: str, default: int | None = None) -> int:
    for alias in _NAMES[name]:
        size = fields.optional_size(alias)
        if size is not None:
            return size
    return fields.size(name, default)
