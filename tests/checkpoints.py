"""Small checkpoints in Hugging Face layout with random weights.

`tiny_llama` and `tiny_deepseek` are whole servable models (weights, tokenizer, chat template) in a few hundred
kilobytes; what they say is noise, but always the same noise. `write_checkpoint` writes any configuration through
transformers' own classes.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["CHAT_TEMPLATE", "tiny_deepseek", "tiny_llama", "write_checkpoint", "write_tokenizer"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CORPUS = (
    "A shoal is many small fish that move as one and close up when one is lost.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "user assistant system hello world what is the time of day in the house by the sea",
)


def write_checkpoint(
    folder: Path,
    config: Any,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "10GB",
    fused_experts: bool = False,
) -> Any:
    """Writes config.json and safetensors of a random model of `config`, a transformers configuration.

    Returns transformers' own model of those weights, for use as an oracle.
    """
    from transformers import AutoModelForCausalLM  # takes seconds to import: most users of this module do without

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of absent shared experts
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
        model.config._experts_implementation = "eager"  # the others want widths that are multiples of 16 bytes
        for name, parameter in model.named_parameters():
            # transformers starts norms at one and biases at zero: a loader that forgot them would go unnoticed.
            if "norm" in name or name.endswith(".bias"):
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.3)
    # transformers holds a layer's experts in two tensors, and writes one by one what it read one by one
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not fused_experts)
    return model


def write_tokenizer(folder: Path, vocab_size: int = 384) -> Tokenizer:
    """Writes tokenizer.json (byte-level BPE), tokenizer_config.json with a ChatML template, and the rest.

    Ids 0, 1 and 2 are `<|endoftext|>`, `<|im_start|>` (beginning) and `<|im_end|>` (end); every byte has a token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    endoftext, start, end = _SPECIAL_TOKENS
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": start,
            "eos_token": end,
            "unk_token": endoftext,
            "pad_token": end,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(folder / "special_tokens_map.json", {"bos_token": start, "eos_token": end, "unk_token": endoftext})
    return tokenizer


def tiny_llama(folder: Path, *, max_position_embeddings: int = 512, seed: int = 0) -> Path:
    """A llama of two layers, four heads and two kv heads with a tokenizer of some 370 ids; returns `folder`."""
    vocab_size = write_tokenizer(folder).get_vocab_size()
    hidden, intermediate, layers, heads, kv_heads, head_dim = 64, 96, 2, 4, 2, 16
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    shapes = {"model.embed_tokens.weight": (vocab_size, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (heads * head_dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
    generator = torch.Generator().manual_seed(seed)
    # A deviation of 0.3 keeps greedy choices far from ties and the text from falling into a loop.
    tensors = {
        name: torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=generator) * 0.3
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_deepseek(folder: Path, *, max_position_embeddings: int = 512, seed: int = 0) -> Path:
    """A V3 of three layers, the first one dense, with four heads and eight experts, and `tiny_llama`'s tokenizer."""
    from workers.weights.random_checkpoint import SHAPES, random_checkpoint

    vocab_size = write_tokenizer(folder).get_vocab_size()
    shape = SHAPES["v3-0.7b"] | {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 40,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "max_position_embeddings": max_position_embeddings,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    random_checkpoint(folder, shape, dtype="float32", seed=seed)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    return folder


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
