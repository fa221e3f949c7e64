"""Small models of odd shapes, where a library that treats the end of a row or call in its own way would show."""

from __future__ import annotations

from pathlib import Path

from workers.weights.random_checkpoint import SHAPES, random_checkpoint

__all__ = ["MODELS", "make_model"]

_DENSE: dict[str, object] = {
    "vocab_size": 203,
    "hidden_size": 90,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, object]] = {
    "llama": _DENSE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3": _DENSE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 22},
    "deepseek": SHAPES["v3-0.7b"]
    | {
        "vocab_size": 203,
        "hidden_size": 60,
        "intermediate_size": 101,
        "moe_intermediate_size": 22,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": 26,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_group": 3,
        "topk_group": 2,
        "max_position_embeddings": 512,
        "rope_scaling": None,
    },
}


def make_model(folder: Path, name: str) -> Path:
    random_checkpoint(folder, MODELS[name], dtype="float32", seed=3)
    return folder
