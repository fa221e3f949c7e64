"""The compiled short way of a host's exchange (`workers/kernels/host_exchange.cpp`), where it has been compiled.

Three calls make an exchange whose wholes are one piece each, as all of a decode step's are: `post`, `hear`, `fetch`.
Whatever is longer goes on in Python from where they say so.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Mapping
from enum import IntEnum
from functools import cache

import torch

from workers.kernels.build import library_path
from workers.parallel.host_link import Link

__all__ = ["ShortWay", "Told", "short_way"]

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_LONG, _SIZE = 1, 6
_TROUBLES = {2: "has gone", 3: "is of another generation", 4: "is out of turn"}
# A rank that waits looks again and again for so long, giving its core to whoever wants it, before it sleeps; less long
# where others of its exchange need that core.
_SPIN_S, _CROWDED_SPIN_S = 1e-3, 50e-6


@cache
def _calls() -> tuple[ctypes._NamedFuncPointer, ...] | None:
    path = library_path()
    if not path.is_file():  # `workers.kernels.native` says so in the log
        return None
    quick, slow = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
    post, hear, fetch = quick.shoal_post, slow.shoal_hear, quick.shoal_fetch
    post.argtypes = (_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT)
    hear.argtypes = (_POINTER, _INT, _POINTER, _INT, _INT, _DOUBLE, _DOUBLE)
    fetch.argtypes = (_POINTER, _INT, *(_POINTER,) * 2, _INT, *(_POINTER,) * 2, _INT)
    for function in (post, hear, fetch):
        function.restype = _INT
    return post, hear, fetch


def short_way(index: int, links: Mapping[int, Link], timeout_s: float) -> ShortWay | None:
    """None where nothing is compiled."""
    calls = _calls()
    return None if calls is None else ShortWay(calls, index, links, timeout_s)


class Told(IntEnum):
    """What goes with rows: nothing, the counts of those for the rank that gets them, or the counts for all ranks."""

    NOTHING = 0
    THEIRS = 1
    ALL = 2


class ShortWay:
    """Counts are int64 [size, n] on the CPU, contiguous, as are the rows."""

    def __init__(
        self, calls: tuple[ctypes._NamedFuncPointer, ...], index: int, links: Mapping[int, Link], timeout_s: float
    ) -> None:
        self._post, self._hear, self._fetch = calls
        self._links = links
        self._size = len(links) + 1
        self._timeout_s = timeout_s
        self._spin_s = _SPIN_S if self._size <= len(os.sched_getaffinity(0)) else _CROWDED_SPIN_S
        # Where the links' states lie; null for this rank.
        self._states = array("q", [links[rank].address if rank in links else 0 for rank in range(self._size)])
        self._at = self._states.buffer_info()[0]

    def post(self, x: torch.Tensor, counts: torch.Tensor, told: Told) -> bool:
        """Sends each rank its rows of x; False, and nothing has been sent, where that is not for this way."""
        for link in self._links.values():
            if link.readable:
                return False
        n = counts.shape[1] if counts.dim() == 2 else 1
        width = x.shape[1] * x.itemsize
        return self._went_short(self._post(self._at, self._size, x.data_ptr(), width, counts.data_ptr(), n, told))

    def hear(self, arrived: torch.Tensor, told: Told) -> bool:
        """Waits for the first piece of every rank, and puts what they tell into `arrived`, [size, size, n] for ALL.

        False where some send more than one: the first ones can be taken from the links then.
        """
        n = arrived.shape[-1] if arrived.dim() > 1 else 1
        state = self._hear(self._at, self._size, arrived.data_ptr(), n, told, self._spin_s, self._timeout_s)
        if self._went_short(state):
            return True
        for link in self._links.values():
            link.adopt()
        return False

    def fetch(self, out: torch.Tensor, x: torch.Tensor, counts: torch.Tensor, receive: torch.Tensor) -> None:
        """Fills `out` with the rows that were heard of, and this rank's own of x."""
        n = counts.shape[1] if counts.dim() == 2 else 1
        width = x.shape[1] * x.itemsize
        state = self._fetch(
            self._at, self._size, out.data_ptr(), x.data_ptr(), width, counts.data_ptr(), receive.data_ptr(), n
        )
        if state & 0xFF == _SIZE:
            link = self._links[state >> 8]
            due = int(receive[state >> 8].sum()) * width
            raise RuntimeError(f"rank {link.rank} sends {link.heard_bytes} bytes where {due} are due")
        assert state == 0

    def _went_short(self, state: int) -> bool:
        """Raises RuntimeError where the call says that a rank is in trouble."""
        if state == 0:
            return True
        trouble = state & 0xFF
        if trouble == _LONG:
            return False
        if trouble in _TROUBLES:
            raise RuntimeError(f"rank {self._links[state >> 8].rank} {_TROUBLES[trouble]}")
        silent = sorted(link.rank for link in self._links.values() if not link.heard)
        raise RuntimeError(f"nothing from ranks {silent} for {self._timeout_s:g} s")
