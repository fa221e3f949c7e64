"""The gate against transformers' own routers."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from workers.model.gate import GateRule, choose_experts

HIDDEN = 24


def _sorted(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, order = ids.sort(dim=-1)
    return ids, weights.gather(-1, order)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_softmax_gates_match_transformers(method: str, scale: float) -> None:
    torch.manual_seed(1)
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        n_routed_experts=20,
        num_experts_per_tok=6,
        n_group=5,
        topk_group=3,
        topk_method=method,
        routed_scaling_factor=scale,
        num_attention_heads=4,
    )
    router = DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(50, HIDDEN)
    logits, weights, ids = router(x)
    limited = method != "greedy"
    rule = GateRule(
        num_experts=20,
        top_k=6,
        sigmoid=False,
        num_groups=5 if limited else 1,
        groups_kept=3 if limited else 1,
        scale=scale,
    )
    ours = choose_experts(logits, rule)
    want_ids, want_weights = _sorted(ids, weights)
    assert torch.equal(ours.expert_ids, want_ids)
    torch.testing.assert_close(ours.weights, want_weights)


@pytest.mark.parametrize(("groups", "kept", "normalize"), [(1, 1, True), (4, 2, True), (8, 4, False)])
def test_sigmoid_gates_match_transformers(groups: int, kept: int, normalize: bool) -> None:
    torch.manual_seed(2)
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=32,
        num_experts_per_tok=8,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    # Large enough to change choices, and to make a chosen score negative, where masking with zero would be wrong.
    router.e_score_correction_bias.copy_(torch.randn(32) * 0.7 - 0.5)
    logits, weights, ids = router(torch.randn(50, HIDDEN))
    rule = GateRule(
        num_experts=32, top_k=8, sigmoid=True, num_groups=groups, groups_kept=kept, normalize=normalize, scale=2.5
    )
    ours = choose_experts(logits, rule, router.e_score_correction_bias)
    want_ids, want_weights = _sorted(ids, weights)
    assert torch.equal(ours.expert_ids, want_ids)
    torch.testing.assert_close(ours.weights, want_weights)
    assert not torch.equal(choose_experts(logits, rule).expert_ids, want_ids)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"num_groups": 3}, "n_group"), ({"groups_kept": 5, "num_groups": 4}, "topk_group"), ({"top_k": 17}, "experts")],
)
def test_a_rule_that_cannot_work_is_refused(change: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        GateRule(**{"num_experts": 16, "top_k": 2, "sigmoid": True, **change})  # type: ignore[arg-type]
