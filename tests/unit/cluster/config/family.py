"""The family's configurations by their published numbers (config.json), for planning: there are no weights."""

from __future__ import annotations

from typing import Any

from cluster.models.folder import ModelFacts
from workers.model.config import parse_config

__all__ = ["FAMILY", "facts"]

_FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}


def _mla(kind: str, layers: int, hidden: int, heads: int, q_rank: int | None, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "dtype": "bfloat16",
        "first_k_dense_replace": 1,
        **more,
    }


def _experts(routed: int, shared: int, chosen: int, size: int, dense: int, vocabulary: int) -> dict[str, Any]:
    return {
        "n_routed_experts": routed,
        "n_shared_experts": shared,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": size,
        "intermediate_size": dense,
        "vocab_size": vocabulary,
    }


def _dense(kind: str, sizes: tuple[int, int, int, int, int, int], **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {
        "model_type": kind,
        **dict(zip((*names, "vocab_size"), sizes, strict=True)),
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
        **more,
    }


_V3 = _mla(
    "deepseek_v3", 61, 7168, 128, 1536, **_experts(256, 1, 8, 2048, 18432, 129280), n_group=8, topk_group=4, **_FP8
)

FAMILY: dict[str, dict[str, Any]] = {
    "V2-Lite": _mla("deepseek_v2", 27, 2048, 16, None, **_experts(64, 2, 6, 1408, 10944, 102400)),
    "V2": _mla("deepseek_v2", 60, 5120, 128, 1536, **_experts(160, 2, 6, 1536, 12288, 102400)),
    "V3": {**_V3, "first_k_dense_replace": 3},
    "Kimi-K2": {
        **_V3,
        **_experts(384, 1, 8, 2048, 18432, 163840),
        "num_attention_heads": 64,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 131072,
    },
    "Qwen-1.5B": _dense("qwen2", (1536, 28, 12, 2, 8960, 151936)),
    "Qwen-7B": _dense("qwen2", (3584, 28, 28, 4, 18944, 152064)),
    "Llama-8B": _dense("llama", (4096, 32, 32, 8, 14336, 128256)),
    "Qwen-14B": _dense("qwen2", (5120, 48, 40, 8, 13824, 152064)),
    "Qwen-32B": _dense("qwen2", (5120, 64, 40, 8, 27648, 152064)),
    "Llama-70B": _dense("llama", (8192, 80, 64, 8, 28672, 128256)),
    "SmolLM2": _dense(
        "llama",
        (576, 30, 9, 3, 1536, 49152),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


def facts(name: str) -> ModelFacts:
    return ModelFacts(config=parse_config(FAMILY[name]), weight_bytes=0)
