"""config.json: both ways of writing it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workers.model.config import parse_config, read_config
from workers.model.sharding import check_plan
from workers.parallel.plan import ParallelPlan

LLAMA: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5},
    ],
)
def test_rope_reads_the_same_in_both_forms(scaling: dict[str, object] | None) -> None:
    old = parse_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = parse_config(LLAMA | {"rope_parameters": {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}})
    assert old == new
    assert old.rope.theta == 5e5
    assert old.rope.type == (scaling or {"rope_type": "default"})["rope_type"]


def test_older_spellings() -> None:
    config = parse_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert (config.rope.type, config.rope.factor, config.rope.theta) == ("linear", 4.0, 10000.0)
    assert config.dtype == "bfloat16"
    assert config.head_dim == 64
    without = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert parse_config(without).num_kv_heads == 9


def test_yarn_without_a_factor_takes_the_ratio_of_lengths() -> None:
    rope = parse_config(LLAMA | {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 2048}}).rope
    assert rope.factor == 4.0


def test_biases_by_architecture() -> None:
    qwen2 = parse_config(LLAMA | {"model_type": "qwen2"})
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    qwen3 = parse_config(LLAMA | {"model_type": "qwen3", "attention_bias": True})
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm, qwen3.head_dim) == (True, True, True, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "rwkv"}, "model_type 'rwkv' is not supported"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "576"}, "hidden_size must be a positive whole number, not '576'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive whole number"),
        ({"vocab_size": 0}, "vocab_size must be a positive whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"num_key_value_heads": 2}, "num_attention_heads 9 must be a multiple of num_key_value_heads 2"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is not supported"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as caught:
        parse_config(LLAMA | changes)
    assert message in str(caught.value)


def test_a_folder_without_or_with_a_broken_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path).num_layers == 30


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            ParallelPlan(tensor=2),
            "parallel.tensor 2 must divide the model's 9 attention heads and 3 key-value heads; sizes that work: 1, 3",
        ),
        (ParallelPlan(tensor=9), "sizes that work: 1, 3"),
        (ParallelPlan(pipeline=31), "parallel.pipeline 31 exceeds the model's 30 layers; 30 or less would work"),
        (ParallelPlan(redundant_experts=1), "parallel.redundant_experts must be 0"),
    ],
)
def test_plans_that_cannot_be(plan: ParallelPlan, message: str) -> None:
    with pytest.raises(ValueError, match=r"^parallel\.") as caught:
        check_plan(parse_config(LLAMA), plan)
    assert message in str(caught.value)


def test_plans_that_can() -> None:
    for plan in (ParallelPlan(), ParallelPlan(tensor=3), ParallelPlan(data=2, tensor=3)):
        check_plan(parse_config(LLAMA), plan)
