"""DeepSeek's config.json: what is read, and what is refused by name."""

from __future__ import annotations

import pytest

from workers.model.config import parse_config
from workers.model.moe_config import GateRule
from workers.model.quantization import BlockQuantization
from workers.model.sharding import Shard, check_plan, shard_parameters, tensor_sizes
from workers.parallel.plan import ParallelPlan
from workers.weights.random_checkpoint import SHAPES

_V3 = SHAPES["v3"]


def test_v3_is_read_as_published() -> None:
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    config = parse_config({**_V3, "quantization_config": quantized})
    assert config.mla is not None
    assert config.moe is not None
    assert config.moe.gate == GateRule(
        num_experts=256, top_k=8, sigmoid=True, num_groups=8, groups_kept=4, normalize=True, scale=2.5
    )
    assert config.moe.correction_bias
    assert config.mla.interleaved
    assert config.rope.mscale_all_dim == 1.0
    assert config.quantization == BlockQuantization(128, 128)
    assert [config.moe.has_experts(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]


def test_v2_lite_is_read_as_published() -> None:
    config = parse_config(SHAPES["v2-lite"])
    assert config.mla is not None
    assert config.moe is not None
    assert config.mla.q_rank is None
    assert config.moe.gate == GateRule(num_experts=64, top_k=6, sigmoid=False)
    assert not config.moe.correction_bias
    assert config.moe.shared_size == 2816


def test_greedy_gates_ignore_groups_and_kimi_is_a_v3() -> None:
    v2 = {**SHAPES["v2-lite"], "n_group": 8, "topk_group": 3}
    greedy, limited = parse_config(v2).moe, parse_config({**v2, "topk_method": "group_limited_greedy"}).moe
    assert greedy is not None
    assert limited is not None
    assert (greedy.gate.num_groups, limited.gate.num_groups) == (1, 8)
    kimi = parse_config({**_V3, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1}).moe
    assert kimi is not None
    assert kimi.gate.sigmoid


def test_some_layers_may_have_no_experts() -> None:
    moe = parse_config({**_V3, "moe_layer_freq": 2, "first_k_dense_replace": 1}).moe
    assert moe is not None
    assert [layer for layer in range(6) if moe.has_experts(layer)] == [2, 4]
    assert parse_config({**_V3, "n_routed_experts": None}).moe is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"q_lora_rank": "big"}, "q_lora_rank"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"n_group": 7}, "n_group 7 does not divide"),
        ({"topk_group": 9}, "topk_group"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' with topk_method 'noaux_tc'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "weight_block_size"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "x"}},
            "scale_fmt",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_config({**_V3, **changes})


def test_plans() -> None:
    config = parse_config(SHAPES["v2-lite"])
    assert tensor_sizes(config) == (1, 2, 4, 8, 16)
    check_plan(config, ParallelPlan(tensor=16))
    for plan, word in (
        (ParallelPlan(tensor=3), "16 attention heads; sizes that work: 1, 2, 4, 8, 16"),
        (ParallelPlan(redundant_experts=2), "redundant_experts"),
    ):
        with pytest.raises(ValueError, match=word):
            check_plan(config, plan)


def test_a_rank_holds_its_experts_and_no_others() -> None:
    config = parse_config({**_V3, "num_hidden_layers": 4})
    shard = Shard(config, 1, 2, experts=(3, 250))
    names = {piece.name for parameter in shard_parameters(shard).values() for piece in parameter.pieces}
    experts = {name.split(".")[5] for name in names if ".mlp.experts." in name}
    assert experts == {"3", "250"}
    assert not any(name.startswith("model.layers.4.") for name in names)
