"""Reads a llama-architecture GGUF into Hugging Face's names, layout and dtype (bfloat16)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

__all__ = ["Fields", "Tensor", "fields_of", "hf_config", "hf_tensors"]

Fields: TypeAlias = Mapping[str, Any]
Tensor: TypeAlias = tuple[str, tuple[int, ...], bytes]  # name, shape, bfloat16 values

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fields_of(reader: gguf.GGUFReader) -> Fields:
    """The file's metadata as plain values. Raises ValueError for another architecture than llama."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"cannot convert a GGUF of architecture {architecture!r}, only 'llama'")
    return fields


def hf_config(fields: Fields, *, tied: bool) -> dict[str, object]:
    """config.json."""
    num_heads = fields["llama.attention.head_count"]
    hidden_size = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # float32 on file
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def hf_tensors(reader: gguf.GGUFReader, fields: Fields) -> Iterator[Tensor]:
    """Every tensor, dequantised. Raises ValueError for one of no known name."""
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if part in heads:
            values = _unpermute(values, heads[part])
        yield _hf_name(tensor.name), tuple(values.shape), _bfloat16(values)


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, suffix = rest.partition(".")
    if not name.startswith("blk.") or part not in _LAYER:
        raise ValueError(f"unknown tensor in the GGUF: {name}")
    return f"model.layers.{block}.{_LAYER[part]}.{suffix}"


def _unpermute(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """GGUF interleaves the halves of each rotary pair; Hugging Face keeps them apart (rotate_half)."""
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _bfloat16(values: npt.NDArray[np.float32]) -> bytes:
    """Rounded to nearest, ties to even. The values are finite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded.tobytes()
