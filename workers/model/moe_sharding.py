"""How a mixture of experts is cut: whole routed experts to the ranks that hold them, shared ones by inner width.

The gate is on every rank, in fp32: two experts whose scores differ by less than a bf16 step must not change places.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.experts import ExpertPlacement, balanced, contiguous, striped
from workers.model.parameters import Parameter, Piece, columns, matrix, stack, vector
from workers.model.shard import Shard
from workers.parallel.plan import ParallelPlan

__all__ = ["expert_parameters", "moe_parameters", "place_experts"]


def place_experts(num_experts: int, plan: ParallelPlan) -> ExpertPlacement:
    """Where the routed experts begin: over DP groups neighbours are apart, which evens out the load of a gate that
    keeps to some groups of them. Redundant ones are spread as if all were loaded alike.

    Raises ValueError naming the axis where the plan cannot be met.
    """
    if plan.expert > num_experts:
        raise ValueError(
            f"parallel.data {plan.data} x parallel.tensor {plan.tensor} are more ranks than the model has experts "
            f"({num_experts}); data {max(1, num_experts // plan.tensor)} or less would work"
        )
    if not plan.redundant_experts:
        return (striped if plan.data > 1 else contiguous)(num_experts, plan.expert)
    if plan.data == 1:
        raise ValueError(
            "parallel.redundant_experts must be 0 where parallel.data is 1: no other group could take over"
        )
    try:
        return balanced([1.0] * num_experts, plan.expert, redundant=plan.redundant_experts)
    except ValueError as error:
        even = -num_experts % plan.expert or plan.expert
        raise ValueError(f"parallel.redundant_experts {plan.redundant_experts}: {error}; {even} would work") from error


def moe_parameters(shard: Shard, ours: str, theirs: str) -> Iterator[Parameter]:
    """Of the layer that is named `ours` here and `theirs` in the checkpoint."""
    config, moe = shard.config, shard.config.moe
    assert moe is not None
    ours, module = f"{ours}.mlp", f"{theirs}.mlp"
    hidden, num_experts = config.hidden_size, moe.gate.num_experts
    yield vector(f"{ours}.norm", f"{theirs}.post_attention_layernorm.weight", hidden)
    yield matrix(f"{ours}.gate.weight", f"{module}.gate.weight", num_experts, hidden, full_precision=True)
    if moe.correction_bias:
        tensor = f"{module}.gate.e_score_correction_bias"
        yield vector(f"{ours}.gate.bias", tensor, num_experts, full_precision=True)
    for slot, expert in enumerate(shard.experts):
        yield from expert_parameters(shard, f"{ours}.experts.{slot}", f"{module}.experts", expert)
    if moe.shared_size:
        shared, part = f"{module}.shared_experts", shard.part(moe.shared_size)
        outputs = [(f"{shared}.{name}", moe.shared_size, part) for name in ("gate_proj", "up_proj")]
        yield stack(f"{ours}.shared.gate_up.weight", outputs, hidden)
        yield columns(f"{ours}.shared.down.weight", f"{shared}.down_proj", hidden, moe.shared_size, part)


def expert_parameters(shard: Shard, ours: str, theirs: str, expert: int) -> Iterator[Parameter]:
    """One routed expert's `gate_up.weight` and `down.weight`, under the name `ours`."""
    return (_fused_expert if shard.fused_experts else _expert)(shard, ours, theirs, expert)


def _expert(shard: Shard, ours: str, module: str, expert: int) -> Iterator[Parameter]:
    hidden, size = _sizes(shard)
    module = f"{module}.{expert}"
    outputs = [(f"{module}.{name}", size, (0, size)) for name in ("gate_proj", "up_proj")]
    yield stack(f"{ours}.gate_up.weight", outputs, hidden)
    yield columns(f"{ours}.down.weight", f"{module}.down_proj", hidden, size, (0, size))


def _fused_expert(shard: Shard, ours: str, module: str, expert: int) -> Iterator[Parameter]:
    """One expert's rows of `gate_up_proj` [experts, 2 * size, hidden] and `down_proj` [experts, hidden, size]."""
    assert shard.config.moe is not None
    num_experts = shard.config.moe.gate.num_experts
    hidden, size = _sizes(shard)
    for name, rows, width in (("gate_up", 2 * size, hidden), ("down", hidden, size)):
        part = (expert * rows, (expert + 1) * rows)
        piece = Piece(f"{module}.{name}_proj", (num_experts, rows, width), part, (0, width))
        yield Parameter(f"{ours}.{name}.weight", (rows, width), (piece,), quantizable=True)


def _sizes(shard: Shard) -> tuple[int, int]:
    assert shard.config.moe is not None
    return shard.config.hidden_size, shard.config.moe.expert_size
