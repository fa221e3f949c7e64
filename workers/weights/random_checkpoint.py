"""Makes checkpoints of DeepSeek's shapes with random weights: `python -m workers.weights.random_checkpoint FOLDER`.

What they say is noise, but always the same noise for the same options; they cost what real ones of their shape cost.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from workers.model.config import ModelConfig, parse_config
from workers.model.quantization import BlockQuantization
from workers.model.sharding import Shard, shard_parameters
from workers.weights.fp8 import SCALE_SUFFIX, quantize, scale_shape
from workers.weights.write import TensorSpec, write_checkpoint

__all__ = ["SHAPES", "main", "random_checkpoint"]

_V3: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_V2_LITE: dict[str, object] = _V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
_SMALL: dict[str, object] = _V3 | {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}

SHAPES: Mapping[str, dict[str, object]] = {
    "v3-0.7b": _SMALL,
    "v2-lite": _V2_LITE,
    "v3": _V3,
    # One layer of V3's own size, with a small vocabulary: its experts are all there is to it.
    "v3-moe-layer": _V3 | {"vocab_size": 1024, "num_hidden_layers": 1, "first_k_dense_replace": 0},
}
_BLOCK = BlockQuantization(128, 128)
_EXPERT = re.compile(r"\.experts\.\d+\.")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random_checkpoint(
    folder: Path,
    shape: Mapping[str, object],
    *,
    dtype: str = "bfloat16",
    fp8: bool = False,
    tokenizer_from: Path | None = None,
    seed: int = 0,
    same_experts: bool = False,
) -> Path:
    """Writes config.json and weights of `shape`, a config.json's contents; returns `folder`.

    With `fp8` the projections are e4m3 in blocks of 128 x 128, as DeepSeek publishes them. The vocabulary grows to that
    of the tokenizer, where one is given. With `same_experts` the routed experts of a layer have equal weights, drawn
    once: they cost as much to run, and far less to make.
    """
    raw = dict(shape) | {"torch_dtype": dtype}
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_from is not None:
        raw |= _copy_tokenizer(tokenizer_from, folder, raw)
    if fp8:
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK.rows, _BLOCK.columns],
        }
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    values = _Values(seed, same_experts=same_experts)
    specs = []
    for name, size in _tensors(parse_config(raw)).items():
        quantized = fp8 and _is_projection(name)
        specs.append(TensorSpec(name, size, torch.float8_e4m3fn if quantized else _DTYPES[dtype]))
        if quantized:
            specs.append(TensorSpec(name + SCALE_SUFFIX, scale_shape(size, _BLOCK), torch.float32))
    write_checkpoint(folder, specs, values)
    return folder


def _tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that one rank alone would read, by the checkpoint's names."""
    experts = () if config.moe is None else tuple(range(config.moe.gate.num_experts))
    parameters = shard_parameters(Shard(config, 0, 1, experts))
    return {piece.name: piece.shape for parameter in parameters.values() for piece in parameter.pieces}


def _is_projection(name: str) -> bool:
    return name.endswith("_proj.weight") or name.endswith("_with_mqa.weight")


class _Values:
    """Random values by name, whatever the order; an FP8 tensor's scales follow it."""

    def __init__(self, seed: int, *, same_experts: bool) -> None:
        self._seed = seed
        self._same_experts = same_experts
        self._drawn: dict[str, torch.Tensor] = {}  # what all experts of the layer have, by the first one's name
        self._scales: dict[str, torch.Tensor] = {}

    def __call__(self, spec: TensorSpec) -> torch.Tensor:
        name = _EXPERT.sub(".experts.0.", spec.name)
        if not self._same_experts or ".experts." not in name:
            return self._make(spec)
        if name not in self._drawn:
            layer = name.partition(".experts.")[0]
            self._drawn = {key: value for key, value in self._drawn.items() if key.startswith(layer)}
            self._drawn[name] = self._make(spec)
        return self._drawn[name]

    def _make(self, spec: TensorSpec) -> torch.Tensor:
        if spec.name in self._scales:
            return self._scales.pop(spec.name)
        if spec.dtype != torch.float8_e4m3fn:
            return self._draw(spec).to(spec.dtype)
        values, self._scales[spec.name + SCALE_SUFFIX] = quantize(self._draw(spec), _BLOCK)
        return values

    def _draw(self, spec: TensorSpec) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed ^ zlib.crc32(spec.name.encode()))
        values = torch.randn(spec.shape, generator=generator)
        if spec.name.endswith("norm.weight"):
            return values.mul_(0.1).add_(1.0)
        if len(spec.shape) == 1:
            return values.mul_(0.1)
        return values if "embed" in spec.name else values.div_(spec.shape[-1] ** 0.5)


def _copy_tokenizer(source: Path, folder: Path, raw: Mapping[str, object]) -> dict[str, object]:
    """Copies what `source` has of a tokenizer; returns what that changes in config.json."""
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer.get("added_tokens", ()))]
    own_size = raw["vocab_size"]
    assert isinstance(own_size, int)
    changes: dict[str, object] = {"vocab_size": max(own_size, max(ids) + 1)}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    changes |= {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    return changes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.weights.random_checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="v3-0.7b")
    parser.add_argument("--layers", type=int, help="only so many of the shape's layers")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--fp8", action="store_true", help="projections in FP8 with 128 x 128 blocks")
    parser.add_argument("--tokenizer-from", type=Path, help="a model folder whose tokenizer to copy")
    parser.add_argument("--same-experts", action="store_true", help="equal weights for a layer's routed experts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = shape | {"num_hidden_layers": options.layers}
    folder = random_checkpoint(
        options.folder,
        shape,
        dtype=options.dtype,
        fp8=options.fp8,
        tokenizer_from=options.tokenizer_from,
        seed=options.seed,
        same_experts=options.same_experts,
    )
    size_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sys.stderr.write(f"{folder}: {options.shape}, {size_bytes / 1e9:.2f} GB\n")


if __name__ == "__main__":
    main()
