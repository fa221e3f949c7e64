"""Every exchange gives what was sent, through one host's memory and over a process group, whatever the sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from random import Random
from typing import Any

import pytest
import torch
from torch import distributed

from tests.unit.workers.parallel.host_exchanges import host_exchanges
from tests.unit.workers.thread_exchange import on_threads
from workers.parallel.exchange import Exchange, ProcessGroupExchange
from workers.parallel.host_link import PIECE_BYTES
from workers.parallel.host_native import Told

Exchanges = Callable[[int], Any]


class GlooComm:
    """deepspeed.comm's all-to-all for a group that belongs to a thread."""

    def __init__(self) -> None:
        self.calls = 0

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int] = (),
        input_split_sizes: Sequence[int] = (),
        group: Any = None,
    ) -> None:
        self.calls += 1
        group.alltoall_base(output, input, list(output_split_sizes), list(input_split_sizes)).wait()


@contextmanager
def gloo_exchanges(ranks: int) -> Iterator[list[Exchange]]:
    store = distributed.HashStore()  # type: ignore[attr-defined]  # from C++

    def meet(rank: int) -> Exchange:
        group = distributed.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=10))
        return ProcessGroupExchange(index=rank, size=ranks, group=group, kind="gloo", comm=GlooComm())

    yield on_threads(ranks, meet)


def _sizes(random: Random, ranks: int, slots: int, row_bytes: int) -> torch.Tensor:
    """Rows from rank to rank and slot, of one step: few, none at all, or many pieces of shared memory."""
    most = random.choice((0, 1, 3, 3, 3, 40, 3 * PIECE_BYTES // row_bytes))
    return torch.tensor(
        [
            [[random.randint(0, most) * (random.random() < 0.5) for _ in range(slots)] for _ in range(ranks)]
            for _ in range(ranks)
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("exchanges", [host_exchanges, gloo_exchanges], ids=["host", "gloo"])
def test_what_is_sent_arrives(exchanges: Exchanges, ranks: int, dtype: torch.dtype) -> None:
    random = Random(ranks)
    slots, width = 3, 50  # rows of odd sizes: parts must be aligned all the same
    traces = [_sizes(random, ranks, slots, width * dtype.itemsize) for _ in range(25)]
    generator = torch.Generator().manual_seed(1)
    sent = [
        [torch.randn(int(sizes[rank].sum()), width, generator=generator).to(dtype) for rank in range(ranks)]
        for sizes in traces
    ]

    with exchanges(ranks) as found:

        def work(rank: int) -> None:
            for sizes, xs in zip(traces, sent, strict=True):
                per_pair = sizes.sum(dim=-1)
                parts = [torch.split(x, pair.tolist()) for x, pair in zip(xs, per_pair, strict=True)]
                rows, arrived = found[rank].counted_rows(xs[rank], sizes[rank])
                assert torch.equal(arrived, sizes[:, rank])
                assert torch.equal(rows, torch.cat([part[rank] for part in parts]))
                back = found[rank].rows(rows, per_pair[:, rank].tolist(), per_pair[rank].tolist())
                assert torch.equal(back, xs[rank])

        on_threads(ranks, work)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_hears_all_that_is_sent(ranks: int) -> None:
    """Whether what a pair of ranks sends is one piece or many."""
    random = Random(ranks)
    traces = [_sizes(random, ranks, 3, 64) for _ in range(25)]
    with host_exchanges(ranks) as found:

        def work(rank: int) -> None:
            for number, sizes in enumerate(traces):
                x = torch.full((int(sizes[rank].sum()), 32), float(rank + 1 + number % 7)).bfloat16()
                rows, told = found[rank].surveyed_rows(x, sizes[rank])
                assert torch.equal(told, sizes)
                senders = torch.arange(ranks).repeat_interleave(sizes[:, rank].sum(dim=1))
                assert torch.equal(rows[:, 0].float(), senders + 1.0 + number % 7)
                plain, arrived = found[rank].counted_rows(x, sizes[rank])
                assert torch.equal(arrived, sizes[:, rank])
                assert torch.equal(plain, rows)

        on_threads(ranks, work)


def test_a_process_group_needs_one_collective_for_counts_and_rows() -> None:
    with gloo_exchanges(2) as found:

        def calls(rank: int) -> list[int]:
            exchange = found[rank]
            assert isinstance(exchange, ProcessGroupExchange)
            made = []
            for count in (3, 3, 200, 200, 0, 5, 3):
                before = exchange._comm.calls
                # one rank's rows decide for both
                sizes = torch.tensor([[0], [count]]) if rank == 0 else torch.tensor([[0], [0]])
                exchange.counted_rows(torch.ones(count * (rank == 0), 16), sizes)
                made.append(exchange._comm.calls - before)
            return made

        assert on_threads(2, calls) == [[1, 1, 2, 1, 1, 2, 1]] * 2


def test_a_rank_that_leaves_is_noticed_at_once() -> None:
    with host_exchanges(3, step_timeout_s=60) as found:

        def work(rank: int) -> None:
            if rank == 1:
                found[1].hang_up()
                return
            with pytest.raises(RuntimeError, match="rank 1 has gone"):
                found[rank].counted_rows(torch.ones(0, 4), torch.zeros(3, 2, dtype=torch.int64))

        on_threads(3, work)


def test_a_rank_that_lets_go_of_its_process_group_is_noticed_at_once() -> None:
    """Though its model keeps the exchange until the next generation's."""
    with gloo_exchanges(2) as found:

        def work(rank: int) -> None:
            found[rank].rows(torch.ones(2, 4), [1, 1], [1, 1])
            if rank == 1:
                found[1].close()
                return
            with pytest.raises(RuntimeError, match=r"(?i)connection (closed|reset)"):
                found[0].rows(torch.ones(2, 4), [1, 1], [1, 1])

        on_threads(2, work)


def test_a_rank_that_hangs_up_frees_its_own_step() -> None:
    with host_exchanges(2, step_timeout_s=60) as found:

        def work(rank: int) -> None:
            if rank == 1:
                found[0].hang_up()  # as a thread beside rank 0's step does
                return
            with pytest.raises(RuntimeError, match="rank 1 has gone"):
                found[0].rows(torch.ones(1, 4), [0, 1], [0, 1])

        on_threads(2, work)


def test_silence_ends_by_the_step_timeout() -> None:
    with (
        host_exchanges(3, step_timeout_s=0.05) as found,
        pytest.raises(RuntimeError, match=r"nothing from ranks \[1, 2\] for 0\.05 s"),
    ):
        found[0].counted_rows(torch.ones(2, 4), torch.tensor([[1], [1], [0]]))


def test_a_rank_that_is_done_may_leave_before_the_others() -> None:
    """Rank 0 is done once it has a row from each; rank 2 still waits for many pieces from rank 1."""
    long = 40 * PIECE_BYTES // 16
    sizes = torch.ones(3, 3, dtype=torch.int64)
    sizes[1, 2] = long
    with host_exchanges(3) as found:

        def work(rank: int) -> None:
            x = torch.full((int(sizes[rank].sum()), 4), float(rank))
            rows, _ = found[rank].counted_rows(x, sizes[rank].unsqueeze(1))
            found[rank].close()
            assert torch.bincount(rows[:, 0].long()).tolist() == sizes[:, rank].tolist()

        on_threads(3, work)


def test_a_rank_that_leaves_with_something_unread_is_heard_first() -> None:
    """The kernel tells of the unread message (ECONNRESET) before it hands out what the rank had sent."""
    with host_exchanges(2) as found:
        x, counts = torch.arange(4.0).view(2, 2), torch.tensor([[1], [1]])
        ours, theirs = (exchange._short for exchange in found)
        assert ours is not None
        assert theirs is not None
        assert ours.post(x, counts, Told.THEIRS)
        assert theirs.post(x + 10, counts, Told.THEIRS)
        found[1].close()
        arrived, received = counts.clone(), torch.empty(2, 2)
        assert ours.hear(arrived, Told.THEIRS)
        ours.fetch(received, x, counts, arrived)
    assert received.tolist() == [[0.0, 1.0], [10.0, 11.0]]


def test_sizes_that_do_not_match_are_an_error() -> None:
    with host_exchanges(2) as found:

        def work(rank: int) -> None:
            with pytest.raises(RuntimeError, match=r"rank \d sends 16 bytes where 32 are due"):
                found[rank].rows(torch.ones(1, 4), [0, 1] if rank == 0 else [1, 0], [0, 2] if rank == 0 else [2, 0])

        on_threads(2, work)
