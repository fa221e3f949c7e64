"""A mixture of experts (DeepSeekMoE, arXiv 2401.06066): routed experts that the gate chooses, and shared ones."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from workers.kernels.seam import GatedLinear, Kernels, Linear, MLPPart, Norm
from workers.model.experts import Experts
from workers.model.moe_config import GateRule
from workers.parallel.collectives import Collectives
from workers.parallel.dispatch import Dispatch, EveryonesRows, ExpertRows, Routing

__all__ = ["Gate", "MoE", "RoutingRecorder", "SharedExperts"]


class RoutingRecorder(Protocol):
    """Hears which experts were chosen, layer by layer of every step; must not change what it is handed."""

    def record(self, layer: int, routing: Routing) -> None:
        """`routing` is of the step's rows, in the order in which the model runs them."""
        ...


class Gate:
    """Scores in fp32 whatever the model's dtype."""

    __slots__ = ("_correction_bias", "_kernels", "_rule", "_weight")

    def __init__(
        self, weight: torch.Tensor, rule: GateRule, correction_bias: torch.Tensor | None, kernels: Kernels
    ) -> None:
        self._weight = weight.t().contiguous()
        self._rule = rule
        self._correction_bias = correction_bias
        self._kernels = kernels

    @property
    def num_experts(self) -> int:
        return self._rule.num_experts

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def __call__(self, x: torch.Tensor) -> Routing:
        return Routing(*self._kernels.by_rows(self._choose, x))

    def _choose(self, x: torch.Tensor) -> Routing:
        logits = self._kernels.product(x.float(), self._weight)
        return self._kernels.choose_experts(logits, self._rule, self._correction_bias)


class SharedExperts:
    """One gated MLP as wide as the shared experts together, or this rank's part of it."""

    __slots__ = ("_down", "_gate_up")

    def __init__(self, gate_up: GatedLinear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        """The inner rows, which need nothing of the routed experts."""
        return self._gate_up(x)

    def plus(self, inner: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        """The outputs of those inner rows, and `routed`."""
        return self._down.plus(inner, routed)

    def part(self, every: EveryonesRows) -> MLPPart:
        """What those rows go through here."""
        return MLPPart(self._gate_up, self._down, every.first, every.last, every.rows)


class MoE:
    """One layer's block: `x + routed(norm(x)) + shared(norm(x))`.

    The residual x is in fp32, what travels to experts in the model's dtype. What `dispatch` combines and what the
    shared experts give are this rank's parts; over the tensor axis they are summed once, together. `recorder` may be
    set at any time between steps. `counts` [num_experts] rises with every token of this rank that an expert is chosen
    for.
    """

    __slots__ = (
        "_dispatch",
        "_experts",
        "_gate",
        "_layer",
        "_norm",
        "_one",
        "_shared",
        "_tensor",
        "counts",
        "recorder",
    )

    def __init__(
        self,
        *,
        layer: int,
        norm: Norm,
        gate: Gate,
        dispatch: Dispatch[Any],
        experts: Experts,
        shared: SharedExperts | None,
        tensor: Collectives,
    ) -> None:
        self._layer = layer
        self._norm = norm
        self._gate = gate
        self._dispatch = dispatch
        self._experts = experts
        self._shared = shared
        self._tensor = tensor
        self.recorder: RoutingRecorder | None = None
        self.counts = torch.zeros(gate.num_experts, dtype=torch.int64, device=gate.device)
        self._one = torch.ones(1, dtype=torch.int64, device=gate.device)

    @property
    def dispatch(self) -> Dispatch[Any]:
        return self._dispatch

    @property
    def experts(self) -> Experts:
        return self._experts

    def relocate(self, dispatch: Dispatch[Any], experts: Experts) -> None:
        """Other experts live here from the next step on. Between steps only, and on all ranks of the stage."""
        self._dispatch, self._experts = dispatch, experts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        h = self._norm(x)
        routing = self._gate(h)
        chosen = routing.expert_ids.flatten()
        self.counts.scatter_add_(0, chosen, self._one.expand_as(chosen))
        if self.recorder is not None:
            self.recorder.record(self._layer, routing)
        if (shared := self._shared) is None or self._dispatch.takes_shared(len(h)):
            rows, handle = self._dispatch.dispatch(h, routing)
            y = self._dispatch.combine(self._compute(rows), handle)
        else:
            inner: list[torch.Tensor] = []
            rows, handle = self._dispatch.dispatch(h, routing, lambda: inner.append(shared.begin(h)))
            y = shared.plus(inner[0], self._dispatch.combine(self._compute(rows), handle))
        return x.add_(self._tensor.all_reduce(y))

    def keep_step(self, nothing: torch.Tensor) -> None:
        """Joins the exchange of a step for which this rank has no tokens; `nothing` is [0, hidden]."""
        rows, handle = self._dispatch.dispatch(nothing, self._gate(nothing))
        self._dispatch.combine(self._compute(rows), handle)

    def _compute(self, rows: ExpertRows) -> torch.Tensor:
        if rows.every is None:
            return self._experts(rows)
        assert self._shared is not None
        return self._experts(rows, self._shared.part(rows.every))
