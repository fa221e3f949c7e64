"""The expert exchange between ranks of one host: rows through shared memory, counts with the first of them.

One message each way and pair, where a process group needs a collective for the counts and one for the rows.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from workers.parallel.dispatch import Meanwhile
from workers.parallel.host_link import PIECE_BYTES, Link
from workers.parallel.host_native import Told, short_way

__all__ = ["HostExchange"]

# A rank that waits looks again and again for so long, giving its core to whoever wants it, before it sleeps: waking
# takes tens of microseconds, and the ranks of a stage mostly arrive within less.
_SPIN_S = 50e-6


class HostExchange:
    """See `Exchange`; `links` are to the other ranks of the axis, by index there.

    A rank from which nothing comes for `timeout_s` in the midst of an exchange counts as lost.
    """

    kind = "shared memory"

    def __init__(self, index: int, links: Mapping[int, Link], timeout_s: float) -> None:
        self.index = index
        self.size = len(links) + 1
        self._links = links
        self._timeout_s = timeout_s
        self._poll = select.poll()
        self._watched = {link.fileno(): link for link in links.values()}
        for descriptor in self._watched:
            self._poll.register(descriptor, select.POLLIN)
        self._short = short_way(index, links, timeout_s)

    def counted_rows(
        self, x: torch.Tensor, counts: torch.Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts = counts.contiguous()
        return self._told_rows(x.contiguous(), counts, counts.clone(), Told.THEIRS, meanwhile)

    def surveyed_rows(
        self, x: torch.Tensor, counts: torch.Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `counted_rows`, but with every rank's whole `counts` [size, size, n], the first index the sender's."""
        counts = counts.contiguous()
        return self._told_rows(x.contiguous(), counts, counts.repeat(self.size, 1, 1), Told.ALL, meanwhile)

    def _told_rows(
        self, x: torch.Tensor, counts: torch.Tensor, heard: torch.Tensor, told: Told, meanwhile: Meanwhile | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows with what is told of them, which goes into `heard`, where this rank's own is already."""
        short = self._short
        if short is None or not short.post(x, counts, told):
            return self._long_told(x, counts, heard, told, meanwhile)
        if meanwhile is not None:
            meanwhile()
        all_there = short.hear(heard, told)
        arrived = heard if told is Told.THEIRS else heard[:, self.index].contiguous()
        if all_there:
            received = x.new_empty(int(arrived.sum()), x.shape[1])
            short.fetch(received, x, counts, arrived)
            return received, heard
        parts = _parts(x, counts.sum(dim=1).tolist())
        transfers = {peer: _Transfer(link, parts[peer], sent=True) for peer, link in self._links.items()}
        return self._fetch(x, parts[self.index], transfers, arrived.sum(dim=1).tolist()), heard

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        short = self._short
        if short is not None:
            x, sent, due = x.contiguous(), torch.tensor(send), torch.tensor(receive)
            if short.post(x, sent, Told.NOTHING):
                if short.hear(due, Told.NOTHING):
                    received = x.new_empty(sum(receive), x.shape[1])
                    short.fetch(received, x, sent, due)
                    return received
                return self._long_rows(x, send, receive, sent=True)
        return self._long_rows(x, send, receive)

    def _long_told(
        self, x: torch.Tensor, counts: torch.Tensor, heard: torch.Tensor, told: Told, meanwhile: Meanwhile | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table, tells = heard.numpy(), counts.numpy()
        parts = _parts(x, counts.sum(dim=1).tolist())
        transfers = {
            peer: _Transfer(link, parts[peer], (tells if told is Told.ALL else tells[peer]).tobytes())
            for peer, link in self._links.items()
        }
        waiting = [transfer for transfer in transfers.values() if not transfer.hear()]
        if meanwhile is not None:
            meanwhile()
        self._run(waiting, _Transfer.hear)
        for peer, transfer in transfers.items():
            table[peer] = np.frombuffer(transfer.head, np.int64).reshape(table[peer].shape)
        arrived = heard if told is Told.THEIRS else heard[:, self.index]
        return self._fetch(x, parts[self.index], transfers, arrived.sum(dim=1).tolist()), heard

    def _long_rows(
        self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int], *, sent: bool = False
    ) -> torch.Tensor:
        parts = _parts(x, send)
        transfers = {peer: _Transfer(link, parts[peer], sent=sent) for peer, link in self._links.items()}
        return self._fetch(x, parts[self.index], transfers, receive)

    def hang_up(self) -> None:
        for link in self._links.values():
            link.hang_up()

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _fetch(
        self, x: torch.Tensor, own: torch.Tensor, transfers: Mapping[int, _Transfer], receive: Sequence[int]
    ) -> torch.Tensor:
        """What all ranks send to this one, `receive` rows each; `own` is its part for itself."""
        received = x.new_empty(sum(receive), x.shape[1])
        into = _parts(received, receive)
        into[self.index].copy_(own)
        for peer, transfer in transfers.items():
            transfer.into = into[peer]
        self._run(transfers.values(), _Transfer.go)
        return received

    def _run(self, transfers: Iterable[_Transfer], advance: Callable[[_Transfer], bool]) -> None:
        """Until `advance` has said of each transfer that it is done."""
        busy = list(transfers)
        while busy := [transfer for transfer in busy if not advance(transfer)]:
            self._wait({transfer.link for transfer in busy})

    def _wait(self, links: set[Link]) -> None:
        """Until a message has come over one of these links. Raises RuntimeError where one of them has ended."""
        started_s = time.monotonic()
        pause_ms = 0
        while True:
            heard = False
            for descriptor, _ in self._poll.poll(pause_ms):
                link = self._watched[descriptor]
                link.read()
                heard |= link in links
                if link.gone:
                    self._poll.unregister(descriptor)  # else it would end every pause
            for link in links:
                if link.gone and not link.readable:  # what it sent before it left counts
                    raise RuntimeError(f"rank {link.rank} has gone")
            if heard:
                return
            waited_s = time.monotonic() - started_s
            if waited_s >= self._timeout_s:
                silent = sorted(link.rank for link in links)
                raise RuntimeError(f"nothing from ranks {silent} for {self._timeout_s:g} s")
            if waited_s < _SPIN_S:
                os.sched_yield()
            else:
                pause_ms = math.ceil(1000 * (self._timeout_s - waited_s))


class _Transfer:
    """What goes to a peer and comes from it in one exchange: at least one piece each way, if an empty one."""

    __slots__ = ("_came", "_head", "_heard", "_out", "_sent", "_started", "head", "into", "link")

    def __init__(self, link: Link, out: torch.Tensor, head: bytes = b"", *, sent: bool = False) -> None:
        """`sent`: all of `out` has gone already."""
        self.link = link
        self.into = out[:0]
        self.head = b""  # the peer's, once `hear` says so
        self._head = head
        self._out = out
        self._started, self._heard = sent, False
        self._sent, self._came = len(out) if sent else 0, 0

    def hear(self) -> bool:
        """Sends the first piece; whether the peer's first one has come and is waiting."""
        self._send()
        if not self._started or not self.link.readable:
            return False
        self.head = self.link.head
        return True

    def go(self) -> bool:
        """Sends and takes what it can; whether all has been sent, and `into` is full."""
        self._send()
        while self.link.readable and not self._complete:
            size, left = self.link.take(self.into[self._came :])
            self._heard = True
            self._came += size
            if self._came + left != len(self.into):
                raise RuntimeError(
                    f"rank {self.link.rank} sends {self._came + left} bytes where {len(self.into)} are due"
                )
        return self._started and self._sent == len(self._out) and self._complete

    @property
    def _complete(self) -> bool:
        return self._heard and self._came == len(self.into)

    def _send(self) -> None:
        while self.link.has_room and not (self._started and self._sent == len(self._out)):
            piece = self._out[self._sent : self._sent + PIECE_BYTES]
            self._sent += len(piece)
            self.link.put(piece, len(self._out) - self._sent, b"" if self._started else self._head)
            self._started = True


def _parts(x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The bytes of x [sum(counts), D], cut by rows."""
    width = x.shape[1] * x.element_size()
    return torch.split(x.contiguous().view(torch.uint8).flatten(), [count * width for count in counts])
