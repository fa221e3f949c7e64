"""Which blocks of the KV cache are taken, and how often: bookkeeping only, no memory.

A block holds the keys and values of `block_size` tokens. It has a reference for each sequence whose table holds it,
so that sequences can share the blocks of a common prefix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["BlockPool"]


class BlockPool:
    """A fixed number of blocks. Ask with `can_allocate`, act with `allocate`, which never fails for want of blocks."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1
        assert block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one reference."""
        assert self.can_allocate(num_blocks)
        if num_blocks == 0:
            return []
        block_ids = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each of these taken blocks."""
        for block_id in block_ids:
            assert self._references[block_id] > 0, f"block {block_id} is free"
            self._references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop a reference to each of these blocks; one without references is free again."""
        for block_id in block_ids:
            assert self._references[block_id] > 0, f"block {block_id} is released twice"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free.append(block_id)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that `tables` are all the references there are, and that every other block is free once."""
        held = Counter(block_id for table in tables for block_id in table)
        free = Counter(self._free)
        for block_id, references in enumerate(self._references):
            assert references == held[block_id], f"block {block_id}: {references} counted, {held[block_id]} held"
            assert free[block_id] == (references == 0), f"block {block_id} is in the free list {free[block_id]} times"
        assert sum(free.values()) + len(held) == self.num_blocks
