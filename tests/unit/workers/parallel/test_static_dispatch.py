"""Dispatch with fixed shapes, and stacked experts behind it, against experts one after the other."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.reference import ReferenceKernels
from workers.model.experts import Experts
from workers.model.gate import GateRule, choose_experts
from workers.model.grouped_experts import GroupedExperts
from workers.parallel.dispatch import ExpertRows, LocalDispatch, Routing
from workers.parallel.static_dispatch import StaticDispatch

EXPERTS, HIDDEN, INNER, TOP_K = 8, 32, 24, 3
CPU = torch.device("cpu")


def _weights(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(expert)
    shapes = ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    a, b = (torch.randn(shape, generator=generator).div(5).bfloat16() for shape in shapes)
    return a, b


def _filled(experts: Experts, held: tuple[int, ...]) -> Experts:
    for slot, expert in enumerate(held):
        experts.put(slot, *_weights(expert))
    return experts


def _tokens(count: int) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, HIDDEN, generator=generator).bfloat16()
    rule = GateRule(num_experts=EXPERTS, top_k=TOP_K, sigmoid=True, normalize=True, scale=2.5)
    return x, choose_experts(torch.randn(count, EXPERTS, generator=generator), rule)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "cut", [((0, 1, 2, 3, 4, 5, 6, 7),), ((0, 1, 2), (7, 6, 3, 4, 5)), ((2,), (0, 1, 3, 4, 5, 6, 7))]
)
def test_the_ranks_parts_add_up(count: int, cut: tuple[tuple[int, ...], ...]) -> None:
    x, routing = _tokens(count)
    local = LocalDispatch(EXPERTS)
    rows, handle = local.dispatch(x, routing)
    expected = local.combine(_filled(Experts(EXPERTS, ReferenceKernels()), tuple(range(EXPERTS)))(rows), handle)
    found = torch.zeros(count, HIDDEN)
    for held in cut:
        seam = StaticDispatch(EXPERTS, held, CPU)
        experts = _filled(GroupedExperts(len(held), ReferenceKernels()), held)
        rows, handle = seam.dispatch(x, routing)
        assert rows.ends is not None
        assert (len(rows.x_RD), rows.ends.dtype) == (count * TOP_K, torch.int32)
        found += seam.combine(experts(rows), handle).float()
    torch.testing.assert_close(found, expected.float(), rtol=3e-2, atol=3e-2)


def test_what_was_not_computed_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library leaves the rows behind the last end as they were, which may be no numbers."""
    x, routing = _tokens(5)
    held = (1, 4)
    seam, experts = StaticDispatch(EXPERTS, held, CPU), _filled(GroupedExperts(2, ReferenceKernels()), held)
    rows, handle = seam.dispatch(x, routing)
    expected = seam.combine(experts(rows), handle)
    grouped = torch._grouped_mm

    def leaves(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        out = grouped(a, b, offs=offs)
        out[int(offs[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(torch, "_grouped_mm", leaves)
    assert torch.equal(seam.combine(experts(rows), handle), expected)


def test_experts_one_after_the_other_want_counts() -> None:
    x, routing = _tokens(3)
    rows, _ = StaticDispatch(EXPERTS, (0, 1), CPU).dispatch(x, routing)
    experts = GroupedExperts(2, ReferenceKernels())
    assert not experts.stacked
    with pytest.raises(AssertionError, match="counts on the host"):
        experts(ExpertRows(*rows))
