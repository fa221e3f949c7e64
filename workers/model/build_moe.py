"""Builds a layer's mixture of experts."""

from __future__ import annotations

from typing import Any

from workers.model.experts import Experts
from workers.model.grouped_experts import GroupedExperts
from workers.model.moe import Gate, MoE, SharedExperts
from workers.model.parts import Parts
from workers.parallel.all_to_all import AllToAllDispatch
from workers.parallel.dispatch import Dispatch, LocalDispatch, ShareDispatch
from workers.parallel.shared_parts import SharedPartsDispatch, SharedWork
from workers.parallel.static_dispatch import StaticDispatch

__all__ = ["build_moe"]


def build_moe(parts: Parts, layer: int, dispatch: Dispatch[Any]) -> MoE:
    """The experts of the shard's slots, reached through `dispatch`."""
    moe = parts.shard.config.moe
    assert moe is not None
    name = f"layers.{layer}.mlp"
    norm = parts.norm(f"{name}.norm")
    gate = Gate(parts.need(f"{name}.gate.weight"), moe.gate, parts.maybe(f"{name}.gate.bias"), parts.kernels)
    kind = GroupedExperts if parts.kernels.groups_experts else Experts
    experts = kind(len(parts.shard.experts), parts.kernels)
    for slot in range(len(parts.shard.experts)):
        expert = f"{name}.experts.{slot}"
        experts.put(slot, parts.weight(f"{expert}.gate_up.weight"), parts.weight(f"{expert}.down.weight"))
    if isinstance(dispatch, LocalDispatch | ShareDispatch) and isinstance(experts, GroupedExperts) and experts.stacked:
        dispatch = StaticDispatch(moe.gate.num_experts, parts.shard.experts, gate.device)
    shared = None
    if moe.shared_size:
        gate_up, down = parts.gated_linear(f"{name}.shared.gate_up"), parts.linear(f"{name}.shared.down")
        shared = SharedExperts(gate_up, down)
        limits = parts.kernels.mlp_parts(gate_up, down)
        # A rank of a tensor axis has its own part of the shared experts already.
        if limits is not None and isinstance(dispatch, AllToAllDispatch) and parts.shard.size == 1:
            work = SharedWork(limits.rows, limits.inner, limits.step, moe.expert_size)
            dispatch = SharedPartsDispatch.instead_of(dispatch, work)
    return MoE(
        layer=layer, norm=norm, gate=gate, dispatch=dispatch, experts=experts, shared=shared, tensor=parts.tensor
    )
