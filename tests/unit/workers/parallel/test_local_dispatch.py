"""Local dispatch and grouped experts against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.kernels.reference import ReferenceKernels
from workers.model.experts import Experts
from workers.model.gate import GateRule, choose_experts
from workers.parallel.dispatch import LocalDispatch


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
def test_grouped_experts_equal_a_loop_over_tokens(num_tokens: int) -> None:
    torch.manual_seed(3)
    experts, hidden, inner, top_k = 8, 16, 12, 3
    gate_up, down = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    x = torch.randn(num_tokens, hidden)
    rule = GateRule(num_experts=experts, top_k=top_k, sigmoid=True, normalize=True, scale=2.5)
    routing = choose_experts(torch.randn(num_tokens, experts), rule)

    seam = LocalDispatch(experts)
    rows, handle = seam.dispatch(x, routing)
    assert sum(rows.counts) == num_tokens * top_k
    local = Experts(experts, ReferenceKernels())
    for expert in range(experts):
        local.put(expert, gate_up[expert], down[expert])
    out = seam.combine(local(rows), handle)

    expected = torch.zeros_like(x)
    for token in range(num_tokens):
        for expert, weight in zip(routing.expert_ids[token].tolist(), routing.weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected[token] += weight * (down[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
