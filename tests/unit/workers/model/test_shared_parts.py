"""Shared experts that ranks of one host read together, against one rank that has everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scheduler.experts import ExpertPlacement, balanced, contiguous, striped
from tests.unit.workers.parallel.host_exchanges import host_exchanges
from tests.unit.workers.thread_exchange import on_threads
from workers.kernels.build import build
from workers.kernels.native import NativeKernels, find_native
from workers.model.experts import Experts
from workers.model.moe import Gate, MoE, SharedExperts
from workers.model.moe_config import GateRule
from workers.parallel.all_to_all import AllToAllDispatch
from workers.parallel.collectives import SingleRank
from workers.parallel.dispatch import Dispatch, LocalDispatch
from workers.parallel.shared_parts import SharedPartsDispatch, SharedWork, fill
from workers.parallel.vacant import LoneExchange

EXPERTS, TOP_K, HIDDEN, INNER, SHARED = 8, 3, 64, 64, 160
RULE = GateRule(num_experts=EXPERTS, top_k=TOP_K, sigmoid=True, normalize=True, scale=2.0, num_groups=1, groups_kept=1)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 80))
def test_parts_even_out_what_can_be(loads: list[int], more: int) -> None:
    parts = fill(loads, more)
    assert sum(parts) == more
    assert min(parts) >= 0
    sums = [load + part for load, part in zip(loads, parts, strict=True)]
    # Nothing was put on a rank that stands more than a remainder above another.
    assert all(total <= min(sums) + 1 for total, part in zip(sums, parts, strict=True) if part)


class _Weights:
    """A layer's, of which every rank builds what it holds."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).div_(shape[-1] ** 0.5).bfloat16()

        self.norm = 1 + some(HIDDEN)
        self.gate = torch.randn(EXPERTS, HIDDEN, generator=generator)
        self.experts = [(some(2 * INNER, HIDDEN), some(HIDDEN, INNER)) for _ in range(EXPERTS)]
        self.shared = some(2 * SHARED, HIDDEN), some(HIDDEN, SHARED)

    def experts_of(self, kernels: NativeKernels, held: Sequence[int]) -> Experts:
        experts = Experts(len(held), kernels)
        for slot, expert in enumerate(held):
            experts.put(slot, *(weight.clone() for weight in self.experts[expert]))
        return experts

    def moe(
        self, kernels: NativeKernels, dispatch: AllToAllDispatch | LocalDispatch, held: Sequence[int] = range(EXPERTS)
    ) -> MoE:
        gate_up, down = kernels.gated_linear(self.shared[0].clone(), None), kernels.linear(self.shared[1].clone(), None)
        limits = kernels.mlp_parts(gate_up, down)
        if limits is None:
            pytest.skip("this processor has no bf16 products")
        used: Dispatch[Any] = dispatch
        if isinstance(dispatch, AllToAllDispatch):
            work = SharedWork(limits.rows, limits.inner, limits.step, INNER)
            used = SharedPartsDispatch.instead_of(dispatch, work)
        return MoE(
            layer=1,
            norm=kernels.rms_norm(self.norm, 1e-6),
            gate=Gate(self.gate, RULE, None, kernels),
            dispatch=used,
            experts=self.experts_of(kernels, held),
            shared=SharedExperts(gate_up, down),
            tensor=SingleRank(),
        )


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    build()
    library = find_native()
    assert library is not None
    return NativeKernels(library)


def _close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Apart by rounding alone: no sum is of more than a few bf16 values."""
    return bool(((ours - expected).float().abs() <= 0.02 * expected.float().abs().max()).all())


STEPS = [(8, 8, 8), (1, 0, 2), (0, 5, 0), (5, 5, 5), (40, 1, 3), (0, 0, 0), (300, 200, 1), (2, 3, 4)]
PLACEMENTS = {
    "two": striped(EXPERTS, 2),
    "three, unevenly": contiguous(EXPERTS, 3),
    "redundant": balanced([float(e + 1) for e in range(EXPERTS)], 2, redundant=4),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_what_comes_out_is_that_of_one_rank(kernels: NativeKernels, name: str) -> None:
    placement: ExpertPlacement = PLACEMENTS[name]
    weights, ranks = _Weights(), placement.num_ranks
    generator = torch.Generator().manual_seed(5)
    xs = [[torch.randn(count, HIDDEN, generator=generator).bfloat16() for count in step] for step in STEPS]
    alone = weights.moe(kernels, LocalDispatch(EXPERTS, kernels.moves))

    with host_exchanges(ranks) as exchanges, torch.inference_mode():

        def work(rank: int) -> list[tuple[bool, torch.Tensor]]:
            moe = weights.moe(
                kernels, AllToAllDispatch(exchanges[rank], placement, moves=kernels.moves), placement.slots[rank]
            )
            found = []
            for step in xs:
                x = step[rank]
                together = moe.dispatch.takes_shared(len(x))
                if len(x):
                    found.append((together, moe(x.clone())))
                else:
                    moe.keep_step(x)
                    found.append((together, x))
            return found

        results = on_threads(ranks, work)
        for rank, steps in enumerate(results):
            for step, (_, ours) in zip(xs, steps, strict=True):
                if len(ours):
                    assert _close(ours, alone(step[rank].clone()))
    used = {together for steps in results for together, _ in steps}
    assert used == {True, False}, "steps of few rows are to share, those of many are not"


def test_every_inner_value_is_computed_once_and_who_has_less_to_read_takes_more(kernels: NativeKernels) -> None:
    placement = contiguous(EXPERTS, 2)
    weights = _Weights()
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(8)).bfloat16()

    with host_exchanges(2) as exchanges, torch.inference_mode():

        def work(rank: int) -> tuple[int, tuple[int, ...]]:
            moe = weights.moe(kernels, AllToAllDispatch(exchanges[rank], placement), placement.slots[rank])
            routing = moe._gate(x)
            routing.expert_ids.copy_(torch.tensor([[0, 1, 2], [0, 1, 3], [0, 2, 4]]))  # four here, one there
            rows, handle = moe.dispatch.dispatch(x, routing)
            moe.dispatch.combine(moe._compute(rows), handle)
            assert rows.every is not None
            return sum(count > 0 for count in rows.counts), tuple(rows.every)

        first, second = on_threads(2, work)
    assert (first[0], second[0]) == (4, 1)
    assert first[1] == (6, 0, 0)
    assert second[1] == (6, 0, SHARED)


def test_experts_that_move_and_ranks_that_are_left_keep_to_it(kernels: NativeKernels) -> None:
    before, after = contiguous(EXPERTS, 2), striped(EXPERTS, 2)
    weights = _Weights()
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(9)).bfloat16()
    expected = weights.moe(kernels, LocalDispatch(EXPERTS, kernels.moves))(x.clone())

    with host_exchanges(2) as exchanges, torch.inference_mode():

        def work(rank: int) -> MoE:
            moe = weights.moe(kernels, AllToAllDispatch(exchanges[rank], before), before.slots[rank])
            assert isinstance(moe.dispatch, SharedPartsDispatch)
            moe.relocate(moe.dispatch.relocated(after), weights.experts_of(kernels, after.slots[rank]))
            assert moe.dispatch.takes_shared(len(x))
            assert _close(moe(x.clone()), expected)
            return moe

        moe = on_threads(2, work)[0]
        assert isinstance(moe.dispatch, SharedPartsDispatch)
        lone = moe.dispatch.regrouped(LoneExchange(), contiguous(EXPERTS, 1))
        moe.relocate(lone, weights.experts_of(kernels, range(EXPERTS)))
        assert not moe.dispatch.takes_shared(len(x)), "one rank reads them once as it is"
        assert _close(moe(x.clone()), expected)
