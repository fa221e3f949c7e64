"""Small random models of architectures that we have no code for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoints import write_checkpoint

__all__ = ["CASES", "checkpoint_of"]

_BASE: dict[str, object] = {
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_ALL_HEADS = {name: value for name, value in _BASE.items() if name != "num_key_value_heads"}
_GPT2: dict[str, object] = {
    "vocab_size": 203,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "gpt_neox: fused projection, parallel blocks, a quarter rotated": ("GPTNeoXConfig", _ALL_HEADS),
    "phi: biases everywhere": ("PhiConfig", _BASE),
    "gemma2: soft caps, every other layer with a window": (
        "Gemma2Config",
        _BASE | {"head_dim": 20, "sliding_window": 8, "query_pre_attn_scalar": 20},
    ),
    "mistral: a window": ("MistralConfig", _BASE | {"sliding_window": 12}),
    "olmo2: norms over all heads": ("Olmo2Config", _BASE),
    "mixtral: experts": ("MixtralConfig", _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss: sinks, experts, a window": (
        "GptOssConfig",
        _BASE | {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2: learned positions": ("GPT2Config", _GPT2),
}


def checkpoint_of(folder: Path, case: str) -> Any:
    """Writes it; transformers' own model of those weights."""
    import transformers

    name, changes = CASES[case]
    return write_checkpoint(folder, getattr(transformers, name)(**changes), seed=len(case))
