"""Routed experts that live on this rank, run grouped: one matrix product per expert and projection, none per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workers.parallel.dispatch import ExpertRows

__all__ = ["run_experts"]


def run_experts(rows: ExpertRows, gate_up_EFD: torch.Tensor, down_EDI: torch.Tensor) -> torch.Tensor:
    """`down @ (silu(gate @ x) * (up @ x))` of each row's own expert; [R, D] in the rows' order.

    `gate_up_EFD` holds gate above up (F = 2 * I) for the E local experts, `down_EDI` [E, D, I]. Experts without rows
    are not touched, so their weights are not read.
    """
    out = torch.empty_like(rows.x_RD)
    start = 0
    for expert, count in enumerate(rows.counts):
        if count == 0:
            continue
        x = rows.x_RD.narrow(0, start, count)
        gate, up = F.linear(x, gate_up_EFD[expert]).chunk(2, dim=-1)
        torch.mm(F.silu(gate).mul_(up), down_EDI[expert].t(), out=out.narrow(0, start, count))
        start += count
    return out
