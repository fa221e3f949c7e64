"""The paged KV cache: its tensors, and how many blocks fit.

A block holds `block_size` tokens of one sequence in every layer. Which sequence owns which block is the batcher's
business; here a token is a slot, `block_id * block_size + offset`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["CacheSize", "KVCache", "LayerCache", "show_size", "size_cache"]


class KVCache:
    """For each layer a tensor [slots, row], where a row is whatever the layer's attention keeps of a token.

    The tensors start as zeros and never hold anything but finite values: attention reads the unused slots of a block
    and masks them, which a NaN would survive. On Linux the zeros take no memory until they are written over.
    """

    def __init__(
        self, rows: list[int], num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.layers = [
            LayerCache(_zeros(num_blocks * block_size, row, dtype=dtype, device=device), block_size) for row in rows
        ]


def _zeros(slots: int, row: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros [slots, row]. torch writes every zero, numpy takes fresh pages of the system, which are zero already."""
    if device.type != "cpu":
        return torch.zeros(slots, row, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(slots * row * dtype.itemsize, np.uint8)).view(dtype).view(slots, row)


class LayerCache:
    """One layer's part."""

    __slots__ = ("_blocks", "_row", "block_size", "slots")

    def __init__(self, slots: torch.Tensor, block_size: int) -> None:
        self.slots = slots
        self.block_size = block_size
        self._row = slots.shape[1]
        self._blocks = slots.view(-1, block_size * self._row)

    def write(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Stores `rows` [T, row] at `slots` [T]."""
        self.slots.index_copy_(0, slots, rows)

    def read(self, block_ids: torch.Tensor) -> torch.Tensor:
        """The rows of the blocks [len(block_ids) * block_size, row], copied together."""
        return self._blocks.index_select(0, block_ids).view(-1, self._row)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSize:
    """What decides how many blocks a rank holds; all sizes in bytes.

    `bytes_per_token` is over all layers. `limit_bytes` is what the cache may take; `limit_name` says where that comes
    from, for the error.
    """

    bytes_per_token: int
    block_size: int
    max_model_len: int
    max_batch_size: int
    limit_bytes: int
    limit_name: str


def size_cache(size: CacheSize) -> int:
    """The number of blocks: what fits, but no more than `max_batch_size` sequences of full length can use.

    Raises ValueError, saying what is needed and which setting would fit, where not even one such sequence fits.
    """
    block_bytes = size.bytes_per_token * size.block_size
    blocks_per_sequence = -(-size.max_model_len // size.block_size)
    num_blocks = min(size.limit_bytes // block_bytes, blocks_per_sequence * size.max_batch_size)
    if num_blocks < blocks_per_sequence:
        fits = max(0, size.limit_bytes // block_bytes) * size.block_size
        advice = f"lower inference.max_model_len to {fits} or less, or raise" if fits else "raise"
        raise ValueError(
            f"the KV cache needs {show_size(blocks_per_sequence * block_bytes)} for one sequence of "
            f"inference.max_model_len {size.max_model_len} and has {show_size(size.limit_bytes)} ({size.limit_name}); "
            f"{advice} that memory"
        )
    return num_blocks


def show_size(size_bytes: int) -> str:
    """For messages, such as "1.25 GiB" or "80 MiB"."""
    unit, name = (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    return f"{max(0, size_bytes) / unit:.3g} {name}"
