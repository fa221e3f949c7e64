"""Dispatch through DeepEP's interface, with a buffer between threads that does what its documentation says."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from scheduler.experts import ExpertPlacement, balanced, contiguous
from tests.unit.workers.thread_exchange import Table, ThreadExchange, on_threads
from workers.parallel.deep_ep import DeepEPDispatch, serves
from workers.parallel.dispatch import ExpertRows, LocalDispatch, Routing

EXPERTS, TOP_K, HIDDEN = 12, 3, 16


class Buffer:
    """`deep_ep.Buffer` over threads: physical experts lie in equal parts on the ranks, in order."""

    def __init__(self, table: Table, rank: int) -> None:
        self._table = table
        self._rank = rank

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        rank_of = topk_idx // (num_experts // self._table.size)
        is_in_rank = (rank_of.unsqueeze(-1) == torch.arange(self._table.size)).any(dim=1)
        return is_in_rank.sum(dim=0), None, per_expert, is_in_rank, None

    def dispatch(
        self,
        x: torch.Tensor,
        *,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_tokens_per_rank: torch.Tensor,
        num_tokens_per_rdma_rank: None,
        is_token_in_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
    ) -> tuple[Any, ...]:
        assert topk_weights.dtype == torch.float32
        assert x.is_contiguous()
        size = self._table.size
        places = [is_token_in_rank[:, rank].nonzero().flatten() for rank in range(size)]
        assert [len(place) for place in places] == num_tokens_per_rank.tolist()

        def exchange(values: torch.Tensor) -> list[torch.Tensor]:
            return self._table.exchange(self._rank, [values[place] for place in places])

        arrived = exchange(x)
        ids, weights = torch.cat(exchange(topk_idx)), torch.cat(exchange(topk_weights))
        slots = len(num_tokens_per_expert) // size
        local = ids - self._rank * slots
        local = torch.where((local >= 0) & (local < slots), local, -1)
        handle = (places, [len(part) for part in arrived], len(x))
        return torch.cat(arrived), local, weights, None, handle, None

    def combine(self, x: torch.Tensor, handle: tuple[list[torch.Tensor], list[int], int]) -> tuple[Any, ...]:
        places, received, num_tokens = handle
        back = self._table.exchange(self._rank, torch.split(x, received))
        out = x.new_zeros(num_tokens, x.shape[1])
        for place, part in zip(places, back, strict=True):
            out[place] += part
        return out, None, None


def _experts(rows: ExpertRows, ids: Any, weights: torch.Tensor) -> torch.Tensor:
    assert len(rows.counts) == len(ids)
    parts = torch.split(rows.x_RD, rows.counts)
    return torch.cat([part @ weights[expert].T for part, expert in zip(parts, ids, strict=True)])


@pytest.mark.parametrize(
    "placement",
    [
        contiguous(EXPERTS, 2),
        contiguous(EXPERTS, 4),
        contiguous(EXPERTS, 5),
        balanced([float(e + 1) for e in range(EXPERTS)], 4, redundant=8),
    ],
)
@pytest.mark.parametrize("tokens", [(5, 0, 3, 1, 2), (0, 0, 0, 0, 0), (40, 17, 1, 9, 0)])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_sums_are_those_of_one_rank(placement: ExpertPlacement, tokens: tuple[int, ...], parts: int) -> None:
    """With two parts neighbours have the same tokens, and each sends half of them."""
    ranks = placement.num_ranks
    if ranks % parts:
        pytest.skip("neighbours come in pairs")
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator)
    xs = [torch.randn(tokens[rank // parts], HIDDEN, generator=generator) for rank in range(0, ranks)]
    xs = [xs[rank // parts * parts] for rank in range(ranks)]
    routings = []
    for x in xs[::parts]:
        ids = torch.rand(len(x), EXPERTS, generator=generator).topk(TOP_K, dim=-1).indices.sort(dim=-1).values
        routings += [Routing(ids, torch.rand(len(x), TOP_K, generator=generator))] * parts
    table = Table(ranks)

    def work(rank: int) -> torch.Tensor:
        seam = DeepEPDispatch(
            Buffer(table, rank), ThreadExchange(table, rank), contiguous(EXPERTS, ranks), part=(rank % parts, parts)
        ).relocated(placement)
        rows, handle = seam.dispatch(xs[rank], routings[rank])
        return seam.combine(_experts(rows, placement.slots[rank], weights), handle)

    combined = on_threads(ranks, work)
    for rank in range(0, ranks, parts):
        alone = LocalDispatch(EXPERTS)
        rows, handle = alone.dispatch(xs[rank], routings[rank])
        expected = alone.combine(_experts(rows, range(EXPERTS), weights), handle)
        found = torch.stack(combined[rank : rank + parts]).sum(dim=0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_numbers_of_ranks_that_it_does_not_know_are_left_to_the_all_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sized:
        """Its own table has these and some larger ones."""

        @staticmethod
        def get_dispatch_config(num_ranks: int) -> object:
            assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
            return object()

        get_combine_config = get_dispatch_config

    module: Any = ModuleType("deep_ep")
    module.Buffer = Sized
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    assert [size for size in range(2, 10) if serves(size)] == [2, 4, 8]
