"""How ranks come to share memory: all of them or none, nobody else, and nothing of another generation."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.workers.parallel.host_exchanges import MemoryBoard, meet_all
from tests.unit.workers.thread_exchange import on_threads
from workers.parallel.host_exchange import HostExchange
from workers.parallel.host_link import _PUT, Link
from workers.parallel.host_meeting import meet


def _linked(*generations: int) -> list[Link]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    links = [Link(rank, generation, end) for rank, generation, end in zip((1, 0), generations, pair, strict=True)]
    for link in links:
        link.open()
    return links


@pytest.fixture
def links() -> Iterator[list[Link]]:
    found = _linked(3, 3)
    yield found
    for link in found:
        link.close()


def test_members_keep_their_order() -> None:
    exchanges = meet_all((2, 5, 7))
    for index, exchange in enumerate(exchanges):
        assert isinstance(exchange, HostExchange)
        assert (exchange.index, exchange.size, exchange.kind) == (index, 3, "shared memory")
        exchange.close()


def test_nothing_is_left_where_anybody_could_find_it() -> None:
    board = MemoryBoard()
    found = on_threads(2, lambda rank: meet(board, rank, (0, 1), generation=1, join_timeout_s=5, step_timeout_s=1))
    for rank, exchange in enumerate(found):
        assert isinstance(exchange, HostExchange)
        name = board.get(f"host-exchange/listen/{rank}").decode()[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late, pytest.raises(ConnectionRefusedError):
            late.connect(f"\0{name}")
        exchange.close()
    shared = [
        line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "shoal-to" in line
    ]
    assert all(path.startswith("/memfd:") for path in shared)  # no file has a name


def test_one_rank_without_memory_keeps_all_from_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = os.posix_fallocate

    def scarce(descriptor: int, offset: int, length: int) -> None:
        # one of the ranks makes the memory that it sends to rank 0 from
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:shoal-to-0"):
            raise OSError(28, "No space left on device")
        allocate(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", scarce)
    assert meet_all((0, 1)) == ["rank 1 cannot share: No space left on device"] * 2


def test_ranks_that_do_not_reach_each_other_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    board = MemoryBoard()

    def one(index: int) -> object:
        if index == 0:
            # what a rank of another network namespace would see: nobody listens under that name
            board.set("host-exchange/listen/0", "+nowhere")
            board.set("host-exchange/connect/0", "+")
            return None
        return meet(board, 1, (0, 1), generation=1, join_timeout_s=5, step_timeout_s=1)

    assert on_threads(2, one)[1] == "rank 1 cannot connect: Connection refused"


def test_strangers_are_turned_away() -> None:
    board = MemoryBoard()
    members = (0, 1)

    def one(index: int) -> object:
        if index == 1:
            name = board.get("host-exchange/listen/0").decode()[1:]
            for hello in (b"", b"hello", struct.pack("=QQ", 2, 1), struct.pack("=QQ", 3, 9)):
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                    stranger.connect(f"\0{name}")
                    stranger.send(hello)
        return meet(board, index, members, generation=3, join_timeout_s=5, step_timeout_s=1)

    for exchange in on_threads(2, one):
        assert isinstance(exchange, HostExchange)
        exchange.close()


def test_another_users_process_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert meet_all((0, 1)) == ["rank 1 cannot connect: another user's process answers for rank 0"] * 2


def test_a_piece_of_another_generation_is_refused() -> None:
    ours, theirs = _linked(3, 2)
    theirs.put(torch.ones(4, dtype=torch.uint8), 0)
    with pytest.raises(RuntimeError, match="rank 1 is of generation 2, not 3"):
        ours.read()
    ours.close()
    theirs.close()


def test_a_piece_out_of_turn_is_refused(links: list[Link]) -> None:
    ours, theirs = links
    theirs.state[_PUT] += 1  # as if a piece had been lost
    theirs.put(torch.ones(4, dtype=torch.uint8), 0)
    with pytest.raises(RuntimeError, match="rank 1 is out of turn"):
        ours.read()


def test_memory_is_not_written_over_before_it_was_read(links: list[Link]) -> None:
    ours, theirs = links
    piece, into = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    theirs.put(piece, 16)
    theirs.put(piece + 8, 8)
    assert not theirs.has_room
    ours.read()
    assert ours.take(into) == (8, 16)
    assert into.tolist() == list(range(8))
    theirs.read()
    assert theirs.has_room
    theirs.put(piece + 16, 0)
    ours.read()
    assert ours.take(into) == (8, 8)
    assert into.tolist() == list(range(8, 16))
    assert ours.take(into) == (8, 0)
    assert into.tolist() == list(range(16, 24))


def test_more_than_fits_is_refused(links: list[Link]) -> None:
    ours, theirs = links
    theirs.put(torch.ones(9, dtype=torch.uint8), 0)
    ours.read()
    with pytest.raises(RuntimeError, match="sends more than is due"):
        ours.take(torch.zeros(8, dtype=torch.uint8))


@pytest.mark.parametrize("unread", [False, True])
def test_what_was_sent_before_the_end_is_read(links: list[Link], unread: bool) -> None:
    """Though the peer leaves with a message of ours unread, which the kernel tells first (ECONNRESET)."""
    ours, theirs = links
    theirs.put(torch.ones(4, dtype=torch.uint8), 0, b"head")
    if unread:
        ours.put(torch.ones(1, dtype=torch.uint8), 0)
    theirs.close()
    ours.read()
    assert ours.readable
    assert not ours.gone
    assert ours.head == b"head"
    ours.take(torch.zeros(4, dtype=torch.uint8))
    assert ours.gone
    with pytest.raises(RuntimeError, match="rank 1 has gone"):
        ours.put(torch.ones(1, dtype=torch.uint8), 0)
