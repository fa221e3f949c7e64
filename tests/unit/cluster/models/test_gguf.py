"""From GGUF to Hugging Face's layout, on numbers small enough to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from cluster.models.convert import convert
from cluster.models.gguf_tokenizer import tokenizer

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 32
BYTE_LETTERS = [*map(chr, range(33, 127)), "Ġ", "Ċ", "Ã", "¤"]
TOKENS = ["<|end|>", "<|start|>", *BYTE_LETTERS, "he", "hel", "Ġw"]
MERGES = ["h e", "he l", "Ġ w"]


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to query and key weights."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def weights() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return random.standard_normal((rows, columns)).astype(np.float32)

    return {
        "token_embd.weight": matrix(len(TOKENS), HIDDEN),
        "output_norm.weight": np.ones(HIDDEN, np.float32),
        "blk.0.attn_q.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.ffn_down.weight": matrix(HIDDEN, 48),
    }


def test_names_values_and_the_order_of_rotary_halves(tmp_path: Path, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    stored = dict(weights)
    stored["blk.0.attn_q.weight"] = permuted(weights["blk.0.attn_q.weight"], HEADS)
    stored["blk.0.attn_k.weight"] = permuted(weights["blk.0.attn_k.weight"], KV_HEADS)
    write_gguf(tmp_path / "m.gguf", stored)
    done: list[tuple[int, int]] = []
    convert(tmp_path / "m.gguf", tmp_path, lambda *counts: done.append(counts))
    assert done[-1] == (5, 5)
    read = load_file(tmp_path / "model.safetensors")
    expected = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    assert set(read) == set(expected)
    for name, source in expected.items():
        assert torch.equal(read[name], torch.from_numpy(weights[source]).to(torch.bfloat16)), name


def test_the_folder_can_be_inspected(tmp_path: Path, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    from cluster.models.folder import inspect

    write_gguf(tmp_path / "m.gguf", weights)
    convert(tmp_path / "m.gguf", tmp_path, lambda done, whole: None)
    facts = inspect(tmp_path)
    assert facts.config.tie_word_embeddings
    assert facts.config.rms_norm_eps == 1e-5
    assert (facts.config.num_heads, facts.config.num_kv_heads, facts.config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert facts.weight_bytes == 2 * sum(weight.size for weight in weights.values())


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"unknown tensor in the GGUF: blk\.0\.ffn_gate_exps\.weight"):
        convert(tmp_path / "m.gguf", tmp_path, lambda done, whole: None)


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_whole(
    tmp_path: Path, weights: dict[str, np.ndarray[Any, Any]]
) -> None:
    write_gguf(tmp_path / "m.gguf", weights)
    convert(tmp_path / "m.gguf", tmp_path, lambda done, whole: None)
    built = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert built.encode("hello world").tokens == ["hel", "l", "o", "Ġw", "o", "r", "l", "d"]
    assert built.encode("x123").tokens == ["x", "1", "2", "3"]
    assert built.encode("<|start|>he<|end|>").tokens == ["<|start|>", "he", "<|end|>"]
    text = "hello world 42\nä"
    assert built.decode(built.encode(text).ids) == text


def test_another_pre_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="pre-tokenizer 'llama-bpe'"):
        tokenizer({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"})
