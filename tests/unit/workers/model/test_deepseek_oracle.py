"""DeepSeek's models against transformers, in fp32 on random weights: the same logits and the same experts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.unit.workers.model.stepping import BLOCK_SIZE, LENGTH, TOLERANCE, distance, expected_logits, run, sequences
from tests.unit.workers.ranks import Ranks
from workers.parallel.dispatch import Routing

_BASE: dict[str, object] = {
    "vocab_size": 203,
    "hidden_size": 60,
    "intermediate_size": 101,
    "moe_intermediate_size": 22,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 26,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _yarn(factor: float, mscale: float, mscale_all_dim: float, theta: float = 10000.0) -> dict[str, object]:
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }


_V2_LITE: dict[str, object] = {"q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": _yarn(40.0, 0.707, 0.707)}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "V2-Lite: no query latent, greedy": ("DeepseekV2Config", _V2_LITE),
    "V2: group-limited greedy, scaled": (
        "DeepseekV2Config",
        {
            "topk_method": "group_limited_greedy",
            "n_routed_experts": 20,
            "n_group": 5,
            "topk_group": 3,
            "num_experts_per_tok": 6,
            "routed_scaling_factor": 16.0,
            "rope_parameters": _yarn(40.0, 0.707, 0.707),
        },
    ),
    "V3: correction bias, groups": ("DeepseekV3Config", {"rope_parameters": _yarn(40.0, 1.0, 1.0)}),
    "Kimi K2: one group, many experts": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 24,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "rope_parameters": _yarn(32.0, 1.0, 1.0, theta=50000.0),
        },
    ),
    "V3, fused experts": ("DeepseekV3Config", {"norm_topk_prob": False, "routed_scaling_factor": 1.3}),
    "V2, fused experts": ("DeepseekV2Config", {"first_k_dense_replace": 0}),
    "V3, seven heads, values wider than keys": (
        "DeepseekV3Config",
        {"num_attention_heads": 7, "num_key_value_heads": 7, "v_head_dim": 26, "q_lora_rank": None},
    ),
    "V3, no shared experts, one dense layer too many": (
        "DeepseekV3Config",
        {"n_shared_experts": 0, "first_k_dense_replace": 3, "tie_word_embeddings": True},
    ),
    "V3, biases, rope in halves": ("DeepseekV3Config", {"attention_bias": True, "rope_interleave": False}),
    "V2-Lite with biases": ("DeepseekV2Config", {"q_lora_rank": None, "attention_bias": True}),
    "V3, cosines scaled": ("DeepseekV3Config", {"rope_parameters": _yarn(8.0, 1.0, 0.5), "rms_norm_eps": 1e-4}),
    "V3, dense throughout": ("DeepseekV3Config", {"first_k_dense_replace": 4}),
}


class Recorder:
    """Chosen experts [tokens, k], sorted, layer by layer."""

    def __init__(self) -> None:
        self.chosen: dict[int, list[torch.Tensor]] = {}

    def record(self, layer: int, routing: Routing) -> None:
        self.chosen.setdefault(layer, []).append(routing.expert_ids.clone())


@pytest.fixture(scope="module", params=sorted(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    import transformers

    name, changes = CASES[request.param]
    config = getattr(transformers, name)(**(_BASE | changes))
    folder = tmp_path_factory.mktemp("checkpoint")
    fused = "fused" in request.param
    model = write_checkpoint(folder, config, seed=len(request.param), max_shard_size="100KB", fused_experts=fused)
    if "Kimi" in request.param:  # which gives the class another name and brings code of its own, never run here
        raw = json.loads((folder / "config.json").read_text())
        raw |= {
            "model_type": "kimi_k2",
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        }
        (folder / "config.json").write_text(json.dumps(raw))
    return folder, model


@pytest.fixture(scope="module")
def ranks(checkpoint: tuple[Path, Any]) -> Iterator[Ranks]:
    ranks = Ranks(checkpoint[0], block_size=BLOCK_SIZE)
    yield ranks
    ranks.close()


def _expected_experts(model: Any, token_ids: list[int]) -> dict[int, torch.Tensor]:
    """What transformers' routers choose, by layer."""
    chosen: dict[int, torch.Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):

            def keep(_module: Any, _inputs: Any, output: Any, number: int = number) -> None:
                chosen[number] = output[2].sort(dim=-1).values

            hooks.append(layer.mlp.gate.register_forward_hook(keep))
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    for hook in hooks:
        hook.remove()
    return chosen


def test_a_whole_prompt_and_its_experts(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    (sequence,) = sequences(1, seed=1)
    recorder = Recorder()
    ranks.runners[0].record_routing(recorder)
    run(ranks, [(sequence, LENGTH)])
    ranks.runners[0].record_routing(None)
    assert distance(sequence, expected_logits(checkpoint[1], sequence)) <= TOLERANCE
    expected = _expected_experts(checkpoint[1], sequence.token_ids)
    assert sorted(recorder.chosen) == sorted(expected)
    for layer, (chosen,) in recorder.chosen.items():
        assert torch.equal(chosen, expected[layer])
        assert len(set(map(tuple, chosen.tolist()))) > 10, "a gate that always chooses the same proves nothing"


def test_odd_chunks_then_decode(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    (sequence,) = sequences(1, seed=2)
    recorder = Recorder()
    ranks.runners[0].record_routing(recorder)
    for count in (5, 1, 13, 16, 7, *[1] * 19):
        run(ranks, [(sequence, count)])
    ranks.runners[0].record_routing(None)
    assert distance(sequence, expected_logits(checkpoint[1], sequence)) <= TOLERANCE
    expected = _expected_experts(checkpoint[1], sequence.token_ids)
    for layer, chosen in recorder.chosen.items():
        assert torch.equal(torch.cat(chosen), expected[layer])


def test_any_mixture_in_one_step(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    found = sequences(6, seed=3)
    rng = random.Random(4)
    while open_sequences := [s for s in found if s.num_computed < len(s.token_ids)]:
        chosen = rng.sample(open_sequences, rng.randint(1, len(open_sequences)))
        run(ranks, [(s, min(rng.choice((1, 1, 1, 3, 9)), len(s.token_ids) - s.num_computed)) for s in chosen])
    for sequence in found:
        assert distance(sequence, expected_logits(checkpoint[1], sequence)) <= TOLERANCE


def test_tensor_parallel(checkpoint: tuple[Path, Any]) -> None:
    """Two or three ranks, where the heads divide."""
    for size in (2, 3):
        if checkpoint[1].config.num_attention_heads % size:
            continue
        ranks = Ranks(checkpoint[0], tensor=size, block_size=BLOCK_SIZE)
        found = sequences(2, seed=5)
        for counts in ((20, 1), (LENGTH - 22, 1), (1, 1), (1, None)):
            run(ranks, [(s, n or len(s.token_ids) - s.num_computed) for s, n in zip(found, counts, strict=True)])
        ranks.close()
        for sequence in found:
            expected = expected_logits(checkpoint[1], sequence)
            assert distance(sequence, expected[: sequence.num_computed]) <= TOLERANCE
