"""Every layer lives on exactly one stage, in order, and no other cut would be more even."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.model.config import ModelConfig, parse_config
from workers.model.layer_split import layer_costs, split_layers
from workers.model.shard import Shard
from workers.model.sharding import shard_parameters
from workers.weights.random_checkpoint import SHAPES

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_V3: dict[str, Any] = dict(SHAPES["v3-0.7b"])


def v3(num_layers: int, **changes: Any) -> ModelConfig:
    return parse_config({**_V3, "num_hidden_layers": num_layers, **changes})


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    num_layers = draw(st.integers(1, 9))
    if draw(st.booleans()):
        shape = {**LLAMA, "num_hidden_layers": num_layers, "tie_word_embeddings": draw(st.booleans())}
        config = parse_config({**shape, "vocab_size": draw(st.integers(8, 4000))})
    else:
        dense = draw(st.integers(0, num_layers))
        config = v3(num_layers, first_k_dense_replace=dense, vocab_size=draw(st.integers(8, 300_000)))
    return config, draw(st.integers(1, num_layers))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_layer_once_in_order_and_as_evenly_as_can_be(case: tuple[ModelConfig, int]) -> None:
    config, num_stages = case
    stages = split_layers(config, num_stages)
    assert len(stages) == num_stages
    assert [layer for stage in stages for layer in stage] == list(range(config.num_layers))
    assert all(stages)
    costs = [*layer_costs(config)]
    costs[-1] += config.vocab_size * config.hidden_size

    def unevenness(cuts: tuple[int, ...]) -> int:
        return sum(sum(costs[start:stop]) ** 2 for start, stop in pairwise((0, *cuts, len(costs))))

    every = combinations(range(1, len(costs)), num_stages - 1)
    found = unevenness(tuple(stage.start for stage in stages[1:]))
    assert found == pytest.approx(min(map(unevenness, every)), rel=1e-12)
    for left, right in pairwise(stages):
        at_left, at_right = (sum(costs[stage.start : stage.stop]) for stage in (left, right))
        if len(left) > 1:
            assert at_left - at_right <= costs[left[-1]], "the last one of the left would be better off on the right"
        if len(right) > 1:
            assert at_right - at_left <= costs[right[0]]


@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from([1, 2]))
def test_stages_hold_what_one_rank_holds(case: tuple[ModelConfig, int], tensor: int) -> None:
    """Every parameter once and in the same order; tied weights are at both ends."""
    config, num_stages = case
    experts = (0, 3) if config.moe is not None else ()
    whole = shard_parameters(Shard(config, 0, tensor, experts))
    held = [shard_parameters(Shard(config, 0, tensor, experts, False, s)) for s in split_layers(config, num_stages)]
    both = {"head"} if config.tie_word_embeddings and num_stages > 1 else set()
    names = [name for stage in held for name in stage]
    assert [name for name in names if name not in both] == list(whole)
    for stage in held:
        assert {name: parameter for name, parameter in stage.items() if name not in both}.items() <= whole.items()
    for place, stage in enumerate(held):
        assert ("embedding" in stage) == (place == 0)
        assert ("norm" in stage) == (place == num_stages - 1)
    if both:
        assert held[-1]["head"].pieces == whole["embedding"].pieces


def test_a_large_head_leaves_its_stage_fewer_layers() -> None:
    small, large = (v3(8, first_k_dense_replace=0, vocab_size=size) for size in (64, 200_000))
    assert [len(stage) for stage in split_layers(small, 2)] == [4, 4]
    first, last = split_layers(large, 2)
    assert len(first) > len(last)


def test_dense_layers_weigh_less_than_those_with_experts() -> None:
    config = v3(12, first_k_dense_replace=6, vocab_size=64)
    costs = layer_costs(config)
    assert len(set(costs)) == 2
    assert costs[0] < costs[-1]
    first, last = split_layers(config, 2)
    assert len(first) > len(last)
