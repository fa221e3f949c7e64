"""Rows from every rank of an axis to every other, with exact counts: what expert dispatch is made of.

Two forms, the same bits: over a process group (here), and through the memory of one host (`host_exchange.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from workers.parallel.dispatch import Meanwhile

__all__ = ["Exchange", "ProcessGroupExchange"]

# Of the rows that travel with their counts, for each pair of ranks: more are sent apart.
_EARLY_BYTES = 1 << 17
_FIRST_ROWS = 8
_WORD = 8


class Exchange(Protocol):
    """All-to-all over one axis. Every call must be made by all its ranks in the same order, with rows or without.

    A peer's death or a step timeout raises RuntimeError.
    """

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def kind(self) -> str:
        """What carries the bytes, in words for `shoal status`."""
        ...

    def counted_rows(
        self, x: torch.Tensor, counts: torch.Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends `counts[r].sum()` rows of x [counts.sum(), D] to rank r and, with them, `counts[r]` of [size, n] int64.

        Gives the rows that came, by sending rank, and the counts: row r came from rank r. `meanwhile` is called while
        they are under way.
        """
        ...

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Sends `send[r]` rows of x [sum(send), D] to rank r; gives [sum(receive), D], by sending rank."""
        ...

    def hang_up(self) -> None:
        """Lets the other ranks know that this one exchanges no more, where they can be told. From any thread."""
        ...

    def close(self) -> None:
        """Gives back what the exchange holds; no call follows."""
        ...


class ProcessGroupExchange:
    """Over a process group, through deepspeed.comm: gloo between CPUs, NCCL between GPUs.

    Counts travel with the first rows of each pair in one all-to-all of equal parts; what does not fit follows in a
    second one. How many rows fit is what the largest part of the exchange before had, which all ranks know: so a
    second one is needed only where the work of a step grows, or for long prompts.
    """

    def __init__(self, *, index: int, size: int, group: Any, kind: str, comm: Any) -> None:
        """`comm` is deepspeed.comm, or what has its `all_to_all_single`."""
        self._comm = comm
        self.group = group
        self._early_rows = _FIRST_ROWS
        self.index = index
        self.size = size
        self.kind = kind

    def counted_rows(
        self, x: torch.Tensor, counts: torch.Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if meanwhile is not None:  # before: who waits for a process group waits in it
            meanwhile()
        send = counts.sum(dim=1).tolist()
        row_bytes = x.shape[1] * x.element_size()
        most = max(1, _EARLY_BYTES // row_bytes)
        early = min(self._early_rows, most)
        head_bytes = (counts.shape[1] + 1) * _WORD
        part_bytes = head_bytes + -(-early * row_bytes // _WORD) * _WORD
        parts = torch.empty(self.size, part_bytes, dtype=torch.uint8, device=x.device)
        head = parts[:, :head_bytes].view(torch.int64)
        head[:, :-1] = counts
        head[:, -1] = max(send)
        parted = torch.split(x, send)
        for part, rows in zip(parts, parted, strict=True):
            first = rows[:early]
            _rows_in(part[head_bytes:], len(first), x).copy_(first)
        came = torch.empty_like(parts)
        self._comm.all_to_all_single(came, parts, group=self.group)
        head = came[:, :head_bytes].view(torch.int64)
        arrived, largest = head[:, :-1].contiguous(), int(head[:, -1].max())
        self._early_rows = min(1 << (largest - 1).bit_length(), most) if largest else 1
        receive = arrived.sum(dim=1).tolist()
        found = [_rows_in(part[head_bytes:], min(count, early), x) for part, count in zip(came, receive, strict=True)]
        if largest > early:  # on every rank or on none
            late = [max(0, count - early) for count in receive]
            rest = self.rows(
                torch.cat([rows[early:] for rows in parted]), [max(0, count - early) for count in send], late
            )
            found = [part for both in zip(found, torch.split(rest, late), strict=True) for part in both]
        return torch.cat(found), arrived

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        received = x.new_empty(sum(receive), *x.shape[1:])
        self._comm.all_to_all_single(
            received,
            x.contiguous(),
            output_split_sizes=list(receive),
            input_split_sizes=list(send),
            group=self.group,
        )
        return received

    def hang_up(self) -> None:
        """Nothing: a process group tells its peers when it is destroyed, and otherwise by its timeout."""

    def close(self) -> None:
        """Lets go of the process group, which its maker destroys."""
        self.group = None


def _rows_in(room: torch.Tensor, count: int, like: torch.Tensor) -> torch.Tensor:
    """The first bytes of `room` as that many rows like those of `like`."""
    width = like.shape[1]
    return room[: count * width * like.element_size()].view(like.dtype).view(count, width)
