"""Which layers each stage of a pipeline holds: runs of neighbours of about equal cost.

A layer costs as much as the weights that it reads for a full batch, all routed experts included; the last stage pays
for the output head too. Looking up embeddings costs memory but hardly time, so the first stage pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from scheduler.planner.runs import even_runs
from workers.model.config import ModelConfig
from workers.model.parameters import Parameter
from workers.model.shard import Shard
from workers.model.sharding import layer_parameters

__all__ = ["layer_costs", "num_elements", "split_layers"]


def num_elements(parameters: Iterable[Parameter]) -> int:
    return sum(prod(parameter.shape) for parameter in parameters)


def layer_costs(config: ModelConfig) -> tuple[int, ...]:
    """Weights of each layer; of two kinds at most."""
    num_experts = 0 if config.moe is None else config.moe.gate.num_experts
    shard = Shard(config, 0, 1, experts=tuple(range(num_experts)))
    known: dict[bool, int] = {}
    costs = []
    for layer in range(config.num_layers):
        has_experts = config.moe is not None and config.moe.has_experts(layer)
        if has_experts not in known:
            known[has_experts] = num_elements(layer_parameters(shard, layer))
        costs.append(known[has_experts])
    return tuple(costs)


def split_layers(config: ModelConfig, num_stages: int) -> tuple[range, ...]:
    """The stages' layers, in order; each has at least one."""
    assert 1 <= num_stages <= config.num_layers
    costs = [*layer_costs(config)]
    # The head is as large as its stage has it to read, be it tied or not.
    costs[-1] += config.vocab_size * config.hidden_size
    return even_runs(tuple(costs), num_stages)
