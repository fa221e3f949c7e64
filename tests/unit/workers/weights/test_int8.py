"""Models with int8 weights against transformers on the same values, and what they take in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_checkpoint
from tests.unit.workers.model.stepping import TOLERANCE, distance, expected_logits, run, sequences
from tests.unit.workers.ranks import Ranks
from workers.kernels.quantized import quantize_int8
from workers.weights.index import CheckpointError


def _config(**changes: object) -> Any:
    import transformers

    values: dict[str, object] = {
        "vocab_size": 203,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 26,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "num_mtp_layers": 0,
    }
    return transformers.DeepseekV3Config(**(values | changes))


def _write(source: Path, stored: Path, read: Path) -> None:
    """`stored` holds the projections in int8; `read` all tensors as they then read, in fp32."""
    tensors, values = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = values[name] = weight
        # kv_b is multiplied from both sides, so the model keeps it as it is
        if "_proj" in name and "kv_b_proj" not in name and not name.endswith(".bias"):
            quantized = quantize_int8(weight)
            tensors[name] = quantized.values.view(weight.shape)
            tensors[name + "_scale"] = quantized.scales.view(*weight.shape[:-1], 1)
            values[name] = tensors[name].float() * tensors[name + "_scale"]
    for folder, content in ((stored, tensors), (read, values)):
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "int8"}}))


def _logits_distance(folder: Path, model: Any, *, tensor: int = 1, quantization: str, dtype: str = "float32") -> float:
    ranks = Ranks(folder, tensor=tensor, block_size=4, quantization=quantization, dtype=dtype)
    (sequence,) = sequences(1, seed=tensor)
    for count in (40, 1, 20):
        run(ranks, [(sequence, count)])
    ranks.close()
    return distance(sequence, expected_logits(model, sequence))


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_in_int8_equals_transformers_on_its_values(tmp_path: Path, fused: bool) -> None:
    import transformers

    write_checkpoint(tmp_path / "plain", _config(), fused_experts=fused)
    _write(tmp_path / "plain", tmp_path / "int8", tmp_path / "read")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "read", dtype=torch.float32)
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    for tensor in (1, 2):
        for quantization in ("none", "int8"):
            folder = tmp_path / "int8"
            assert _logits_distance(folder, model, tensor=tensor, quantization=quantization) <= TOLERANCE
    # and the same when it is quantized as it is loaded
    assert _logits_distance(tmp_path / "plain", model, quantization="int8") <= TOLERANCE


def test_int8_takes_half_the_memory_of_bf16(tmp_path: Path) -> None:
    config = _config(hidden_size=256, intermediate_size=2048, moe_intermediate_size=256, vocab_size=64)
    write_checkpoint(tmp_path, config, dtype=torch.bfloat16)
    taken = {}
    for quantization in ("none", "int8"):
        ranks = Ranks(tmp_path, quantization=quantization, dtype="bfloat16")
        taken[quantization] = ranks.runners[0].report
        ranks.close()
    assert taken["int8"].weight_bytes < 0.53 * taken["none"].weight_bytes
    assert "int8" in taken["int8"].kernels
    assert "int8" not in taken["none"].kernels


def test_in_bf16_the_logits_are_as_near_as_those_of_bf16(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, _config(first_k_dense_replace=2))  # no gate: it might choose otherwise
    plain = _logits_distance(tmp_path, model, quantization="none", dtype="bfloat16")
    assert _logits_distance(tmp_path, model, quantization="int8", dtype="bfloat16") <= 4 * plain


def test_scales_that_are_missing_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain", _config())
    _write(tmp_path / "plain", tmp_path / "int8", tmp_path / "read")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight_scale"))
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "int8" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"without its scales, .*o_proj\.weight_scale"):
        Ranks(tmp_path / "int8")


def test_fp8_wants_a_checkpoint_in_fp8(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _config())
    with pytest.raises(ValueError, match="needs a checkpoint in FP8"):
        Ranks(tmp_path, quantization="fp8")
    with pytest.raises(ValueError, match=r"inference\.quantization must be one of none, fp8, int8"):
        Ranks(tmp_path, quantization="int4")
