"""What the layers' caches keep of decoding sequences beside their blocks: the contexts, padded and side by side.

Attention over a batch wants contexts in one tensor, and copying them there out of their blocks costs about half as
much as attention itself. So the copy, a window, is kept: while the same sequences decode, a step adds one row to each.

This file decides, on numbers alone, when a window may still be used. It is right if the sequences have the same blocks
as before and one token more, and if nothing else has written to any of those blocks since: every write of a step goes
through here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workers.inputs import Ints

__all__ = ["Fill", "Windows"]

_SPARE_TOKENS = 128  # room for as many steps before a window is made anew


@dataclass(frozen=True, slots=True)
class Fill:
    """How a group's window comes about: read anew from `block_ids`, or kept, with the new rows at `slots`."""

    block_ids: Ints | None
    slots: Ints | None
    keep: bool


@dataclass(slots=True)
class _Window:
    """What one window holds: the first `lengths` tokens of `blocks`, `width` slots apart."""

    blocks: Ints
    lengths: Ints
    width: int


class Windows:
    """Windows by number, of `max_slots` slots together; 0 keeps none."""

    def __init__(self, block_size: int, max_slots: int) -> None:
        self._block_size = block_size
        self._max_slots = max_slots
        self._windows: dict[int, _Window] = {}

    def written(self, blocks: Ints) -> None:
        """Rows of other sequences than those that decode go to these blocks."""
        for index in [i for i, window in self._windows.items() if np.isin(blocks, window.blocks).any()]:
            del self._windows[index]

    def trim(self, count: int) -> None:
        """The step has only so many groups; the cache drops the windows beyond."""
        for index in [i for i in self._windows if i >= count]:
            del self._windows[index]

    def forget(self) -> None:
        """After a step that failed: nobody knows how far it came."""
        self._windows.clear()

    def fill(self, index: int, blocks: Ints, lengths: Ints) -> Fill:
        """The window of group `index`, for contexts of `lengths` in `blocks` [sequences, blocks of the longest]."""
        window = self._windows.pop(index, None)
        if window is not None and self._continues(window, blocks, lengths):
            self._windows[index] = _Window(blocks, lengths, window.width)
            return Fill(None, np.arange(len(lengths)) * window.width + lengths - 1, True)
        spare = -(-_SPARE_TOKENS // self._block_size)
        width = (blocks.shape[1] + spare) * self._block_size
        used = sum(len(other.lengths) * other.width for other in self._windows.values())
        if used + len(lengths) * width > self._max_slots:
            return Fill(blocks.reshape(-1), None, False)
        self._windows[index] = _Window(blocks, lengths, width)
        return Fill(np.pad(blocks, ((0, 0), (0, spare)), mode="edge").reshape(-1), None, True)

    def _continues(self, window: _Window, blocks: Ints, lengths: Ints) -> bool:
        if len(lengths) != len(window.lengths) or int(lengths[-1]) > window.width:
            return False
        known = window.blocks.shape[1]
        unused = np.arange(known) >= -(-window.lengths // self._block_size)[:, None]
        return bool((lengths == window.lengths + 1).all() and ((blocks[:, :known] == window.blocks) | unused).all())
