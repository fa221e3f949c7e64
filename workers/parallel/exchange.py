"""Rows from every rank of an axis to every other, with exact counts: what expert dispatch is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

__all__ = ["Exchange", "ProcessGroupExchange"]


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

    def counts(self, counts: torch.Tensor) -> torch.Tensor:
        """`counts[r]` [size, n] int64 goes to rank r; row r of the result came from rank r."""
        ...

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Sends `send[r]` rows of x [sum(send), D] to rank r; gives [sum(receive), D], by sending rank."""
        ...


class ProcessGroupExchange:
    """Over a process group, through deepspeed.comm: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, *, index: int, size: int, group: Any, kind: str) -> None:
        from deepspeed import comm  # heavy, and one rank alone needs none of it

        self._comm = comm
        self._group = group
        self.index = index
        self.size = size
        self.kind = kind

    def counts(self, counts: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(counts)
        self._comm.all_to_all_single(received, counts.contiguous(), group=self._group)
        return received

    def rows(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        received = x.new_empty(sum(receive), *x.shape[1:])
        self._comm.all_to_all_single(
            received,
            x.contiguous(),
            output_split_sizes=list(receive),
            input_split_sizes=list(send),
            group=self._group,
        )
        return received
