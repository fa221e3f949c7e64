"""All-to-all dispatch over threads in one process: the same bits as one rank, wherever the experts live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from scheduler.experts import ExpertPlacement, balanced, contiguous
from tests.unit.workers.parallel.host_exchanges import host_exchanges
from tests.unit.workers.thread_exchange import Table, ThreadExchange, on_threads
from workers.parallel.all_to_all import AllToAllDispatch
from workers.parallel.dispatch import ExpertRows, LocalDispatch, Routing

EXPERTS, TOP_K, HIDDEN = 12, 3, 16


def _experts(rows: ExpertRows, ids: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
    """Row by row, so that a row's bits cannot depend on its neighbours."""
    assert len(rows.counts) == len(ids)
    out, start = torch.empty_like(rows.x_RD), 0
    for expert, count in zip(ids, rows.counts, strict=True):
        for row in range(start, start + count):
            out[row] = weights[expert] @ rows.x_RD[row]
        start += count
    assert start == len(rows.x_RD)
    return out


def _routing(num_tokens: int, generator: torch.Generator) -> Routing:
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    ids = scores.topk(TOP_K, dim=-1).indices.sort(dim=-1).values if num_tokens else torch.empty(0, TOP_K).long()
    return Routing(ids, torch.rand(num_tokens, TOP_K, generator=generator))


@contextmanager
def _thread_exchanges(ranks: int) -> Iterator[list[ThreadExchange]]:
    table = Table(ranks)
    yield [ThreadExchange(table, rank) for rank in range(ranks)]


EXCHANGES: dict[str, Callable[[int], Any]] = {"threads": _thread_exchanges, "shared memory": host_exchanges}
PLACEMENTS = {
    "two neighbours": contiguous(EXPERTS, 2),
    "four neighbours": contiguous(EXPERTS, 4),
    "uneven": contiguous(EXPERTS, 5),
    "balanced": balanced([float(2**e) for e in range(EXPERTS)], 3),
    "redundant": balanced([float(e + 1) for e in range(EXPERTS)], 4, redundant=8),
}


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("tokens", [(5, 0, 3, 1, 2), (0, 0, 0, 0, 0), (40, 17, 1, 9, 0)])
@pytest.mark.parametrize("kind", EXCHANGES)
def test_the_bits_are_those_of_one_rank(name: str, tokens: tuple[int, ...], kind: str) -> None:
    placement: ExpertPlacement = PLACEMENTS[name]
    ranks = placement.num_ranks
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator)
    xs = [torch.randn(tokens[rank], HIDDEN, generator=generator) for rank in range(ranks)]
    routings = [_routing(tokens[rank], generator) for rank in range(ranks)]

    with EXCHANGES[kind](ranks) as exchanges:

        def work(rank: int) -> torch.Tensor:
            seam = AllToAllDispatch(exchanges[rank], placement)
            rows, handle = seam.dispatch(xs[rank], routings[rank])
            return seam.combine(_experts(rows, placement.slots[rank], weights), handle)

        combined = on_threads(ranks, work)

    for rank, found in enumerate(combined):
        alone = LocalDispatch(EXPERTS)
        rows, handle = alone.dispatch(xs[rank], routings[rank])
        expected = alone.combine(_experts(rows, range(EXPERTS), weights), handle)
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


def test_redundant_copies_share_the_rows() -> None:
    placement = ExpertPlacement(2, ((0, 1), (0,)))
    table = Table(2)
    counts: list[list[int]] = [[], []]

    def work(rank: int) -> torch.Tensor:
        seam = AllToAllDispatch(ThreadExchange(table, rank), placement)
        ids = torch.zeros(10, 1, dtype=torch.long)
        rows, handle = seam.dispatch(torch.randn(10, 4), Routing(ids, torch.ones(10, 1)))
        counts[rank] = rows.counts
        return seam.combine(rows.x_RD, handle)

    on_threads(2, work)
    assert counts == [[10, 0], [10]]
