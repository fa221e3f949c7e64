"""The head that ranks of one host read together, against the head of each alone."""

from __future__ import annotations

import pytest
import torch

from tests.unit.workers.thread_exchange import Table, ThreadExchange, on_threads
from workers.kernels.build import build
from workers.kernels.native import NativeKernels, find_native
from workers.kernels.seam import Linear
from workers.model.head import head
from workers.model.shared_read_head import SharedReadHead
from workers.parallel.collectives import SingleRank

VOCABULARY, HIDDEN = 384, 64
STEP = 1 / 128  # between neighbouring bf16 values, relative to them, at most


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    build()
    library = find_native()
    assert library is not None
    return NativeKernels(library)


def _parts(kernels: NativeKernels, seed: int = 0) -> tuple[Linear, torch.Tensor]:
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()
    linear = kernels.linear(weight.clone(), None)
    if kernels.in_parts(linear) is None:
        pytest.skip("this processor has no bf16 products")
    return linear, weight


@pytest.mark.parametrize("steps", [[(1, 0)], [(3, 2), (0, 0), (0, 5)], [(40, 1), (8, 8)], [(2, 0, 1), (5, 5, 5)]])
def test_the_logits_are_those_of_each_rank_alone(kernels: NativeKernels, steps: list[tuple[int, ...]]) -> None:
    linear, weight = _parts(kernels)
    table = Table(len(steps[0]))
    generator = torch.Generator().manual_seed(1)
    xs = [[torch.randn(rows, HIDDEN, generator=generator).bfloat16() for rows in step] for step in steps]
    alone = head(kernels, linear, weight, VOCABULARY, SingleRank())

    def work(rank: int) -> None:
        exchange = ThreadExchange(table, rank)
        shared = head(kernels, linear, weight, VOCABULARY, SingleRank(), lambda: exchange)
        assert isinstance(shared, SharedReadHead)
        for step in xs:
            if not len(step[rank]):
                shared.keep_step(step[rank])
                continue
            ours, expected = shared(step[rank]), alone(step[rank])
            assert expected is not None
            assert ours.dtype == torch.float32
            assert ours.shape == expected.shape
            assert bool(((ours - expected).abs() <= STEP * expected.abs() + 1e-3 * expected.abs().max()).all())
            assert torch.equal(ours.argmax(dim=1), expected.argmax(dim=1))

    with torch.inference_mode():
        on_threads(len(steps[0]), work)


def test_without_neighbours_it_is_the_head_alone(kernels: NativeKernels) -> None:
    linear, weight = _parts(kernels)
    x = torch.randn(2, HIDDEN).bfloat16()
    lone = ThreadExchange(Table(1), 0)
    odd = ThreadExchange(Table(5), 0)  # parts of a vocabulary must be equal
    for neighbours in (lambda: None, lambda: lone, lambda: odd):
        shared = head(kernels, linear, weight, VOCABULARY, SingleRank(), neighbours)
        shared.keep_step(x[:0])
        ours, expected = shared(x), head(kernels, linear, weight, VOCABULARY, SingleRank())(x)
        assert ours is not None
        assert expected is not None
        assert torch.equal(ours, expected)
