"""The planner's count of a model's bytes against the loader's own, rank by rank."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cluster.config.model_shape import model_shape
from cluster.models.folder import ModelFacts
from scheduler.planner.memory import stage_layers, stage_weights
from scheduler.planner.shape import Axes
from tests.unit.cluster.config.family import FAMILY, facts
from workers.model.config import parse_config
from workers.model.layer_split import split_layers
from workers.model.shard import Shard
from workers.model.sharding import place_experts, shard_parameters
from workers.parallel.plan import ParallelPlan
from workers.weights.form import form_of, held_bytes
from workers.weights.scales import FP8

# Of deep models a few layers of each kind tell as much.
SHALLOW: dict[str, dict[str, Any]] = {
    "V3": {**FAMILY["V3"], "num_hidden_layers": 5, "n_routed_experts": 32},
    "V2-Lite": {**FAMILY["V2-Lite"], "num_hidden_layers": 3},
    "Qwen-7B": {**FAMILY["Qwen-7B"], "num_hidden_layers": 4},
    "SmolLM2": FAMILY["SmolLM2"],
}
PLANS = [
    {"data": data, "pipeline": pipeline, "tensor": tensor}
    for data, pipeline, tensor in itertools.product((1, 2), (1, 3), (1, 2, 3, 4))
]


@pytest.mark.parametrize(("name", "quantization"), [*itertools.product(SHALLOW, ("none", "int8")), ("V3", "fp8")])
def test_bytes_are_those_that_a_rank_will_hold(name: str, quantization: str) -> None:
    config = parse_config(SHALLOW[name])
    shape = model_shape(
        ModelFacts(config=config, weight_bytes=0), dtype="bfloat16", quantization=quantization, packs_head=False
    )
    for axes in (Axes(**plan) for plan in PLANS if plan["tensor"] in shape.tensor_sizes):
        plan = ParallelPlan(data=axes.data, pipeline=axes.pipeline, tensor=axes.tensor)
        stages = stage_layers(shape, axes.pipeline)
        assert stages == split_layers(config, axes.pipeline)
        for stage, layers in enumerate(stages):
            heaviest = max(
                _held(config, plan, rank, layers, quantization)
                for rank in range(plan.num_ranks)
                if plan.place(rank).stage == stage
            )
            assert stage_weights(shape, axes, layers) == pytest.approx(heaviest, rel=2e-3)


def _held(config: Any, plan: ParallelPlan, rank: int, layers: range, quantization: str) -> int:
    place = plan.place(rank)
    experts = () if config.moe is None else place_experts(config.moe.gate.num_experts, plan).slots[place.expert_index]
    parameters = shard_parameters(Shard(config, place.tensor_index, plan.tensor, experts, layers=layers)).values()
    stored = [FP8] if config.quantization else ["BF16"]
    return sum(
        held_bytes(each, form_of(each, quantization, stored), torch.bfloat16, config.quantization)
        for each in parameters
    )


@pytest.mark.parametrize(
    ("name", "billions"), [("V2-Lite", 15.7), ("V2", 235.7), ("V3", 671.0), ("SmolLM2", 0.1345), ("Llama-70B", 70.6)]
)
def test_parameters_are_as_many_as_published(name: str, billions: float) -> None:
    shape = model_shape(facts(name), dtype="bfloat16", quantization="none", packs_head=False)
    elements = stage_weights(shape, Axes(), range(len(shape.layers))) / 2
    assert elements / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(("name", "kilobytes"), [("V2-Lite", 31.1), ("V2", 69.1), ("V3", 70.3)])
def test_the_latent_cache_is_as_small_as_published(name: str, kilobytes: float) -> None:
    shape = model_shape(facts(name), dtype="bfloat16", quantization="none", packs_head=False)
    assert shape.cache_whole_bytes * len(shape.layers) / 1e3 == pytest.approx(kilobytes, abs=0.05)
