"""Stacked experts against experts one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from workers.kernels.reference import ReferenceKernels
from workers.model.experts import Experts
from workers.model.grouped_experts import GroupedExperts
from workers.parallel.dispatch import ExpertRows

HIDDEN, INNER, SLOTS = 32, 24, 5


def _weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    a, b = (torch.randn(shape, generator=generator).div(5).to(dtype) for shape in shapes)
    return a, b


def _filled(experts: Experts, seeds: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Experts:
    for slot, seed in enumerate(seeds):
        experts.put(slot, *_weights(seed, dtype))
    return experts


def _rows(counts: list[int], dtype: torch.dtype = torch.bfloat16) -> ExpertRows:
    generator = torch.Generator().manual_seed(9)
    return ExpertRows(torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype), counts)


@pytest.mark.parametrize("counts", [[3, 0, 1, 8, 0], [0, 0, 0, 0, 4], [1, 1, 1, 1, 1], [20, 33, 0, 2, 7]])
def test_the_same_as_one_by_one(counts: list[int]) -> None:
    kernels = ReferenceKernels()
    grouped = _filled(GroupedExperts(SLOTS, kernels), range(SLOTS))
    expected = _filled(Experts(SLOTS, kernels), range(SLOTS))(_rows(counts))
    for _ in range(2):  # the second time from the stack
        torch.testing.assert_close(grouped(_rows(counts)), expected, rtol=2e-2, atol=2e-2)


def test_experts_move_and_are_replaced() -> None:
    kernels, rows = ReferenceKernels(), _rows([4, 2, 3])
    grouped = _filled(GroupedExperts(SLOTS, kernels), range(SLOTS))
    grouped(_rows([1] * SLOTS))
    moved = grouped.rearranged([3, grouped.build(*_weights(40)), 0])
    torch.testing.assert_close(moved(rows), _filled(Experts(3, kernels), [3, 40, 0])(rows), rtol=2e-2, atol=2e-2)
    moved.put(1, *_weights(41))
    torch.testing.assert_close(moved(rows), _filled(Experts(3, kernels), [3, 41, 0])(rows), rtol=2e-2, atol=2e-2)


def test_what_cannot_be_grouped_runs_one_by_one() -> None:
    kernels, rows = ReferenceKernels(), _rows([2, 0, 1], torch.float32)
    grouped = _filled(GroupedExperts(3, kernels), range(3), torch.float32)
    torch.testing.assert_close(grouped(rows), _filled(Experts(3, kernels), range(3), torch.float32)(rows))
