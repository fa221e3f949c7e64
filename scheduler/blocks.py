"""Which blocks of the KV cache are taken, how often, and what they hold: bookkeeping only, no memory.

A block holds the keys and values of `block_size` tokens. It has a reference for each sequence whose table holds it,
so that sequences can share the blocks of a common prefix. A full block may be published under a hash of everything
up to its end; without references it stays findable until its room is needed, the one idle for longest going first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
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
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable and without references, longest idle first
        self._references = [0] * num_blocks
        self._block_ids: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, findable ones among them."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_free

    def num_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these findable blocks are without references: sharing them makes as many fewer free."""
        return sum(block_id in self._idle for block_id in block_ids)

    def num_owned_alone(self, block_ids: Iterable[int]) -> int:
        """How many of these taken blocks would be free if one reference to each were dropped."""
        return sum(self._references[block_id] == 1 for block_id in block_ids)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one reference; what they held can no longer be found."""
        assert self.can_allocate(num_blocks)
        if num_blocks == 0:
            return []
        block_ids = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        while len(block_ids) < num_blocks:
            block_id, _ = self._idle.popitem(last=False)
            del self._block_ids[self._hashes.pop(block_id)]
            block_ids.append(block_id)
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each of these blocks, which are taken or findable."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                assert block_id in self._idle, f"block {block_id} is free"
                del self._idle[block_id]
            self._references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop a reference to each of these blocks. The first to lose its last one is the first to be used again."""
        for block_id in block_ids:
            assert self._references[block_id] > 0, f"block {block_id} is released twice"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                if block_id in self._hashes:
                    self._idle[block_id] = None
                else:
                    self._free.append(block_id)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let a taken, full block be found; where another one holds the same, that one stays the one to be found."""
        assert self._references[block_id] > 0, f"block {block_id} is free"
        assert block_id not in self._hashes, f"block {block_id} is published twice"
        if block_hash not in self._block_ids:
            self._block_ids[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def find(self, block_hash: bytes) -> int | None:
        """The block published under this hash."""
        return self._block_ids.get(block_hash)

    def hash_of(self, block_id: int) -> bytes | None:
        """The hash under which this block can be found."""
        return self._hashes.get(block_id)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that `tables` are all the references there are, and that every other block is free or idle once."""
        held = Counter(block_id for table in tables for block_id in table)
        unused = Counter([*self._free, *self._idle])
        for block_id, references in enumerate(self._references):
            assert references == held[block_id], f"block {block_id}: {references} counted, {held[block_id]} held"
            assert unused[block_id] == (references == 0), f"block {block_id} is listed {unused[block_id]} times"
        assert sum(unused.values()) + len(held) == self.num_blocks
        assert self._hashes == {block_id: block_hash for block_hash, block_id in self._block_ids.items()}
        assert self._idle.keys() == {block_id for block_id in self._hashes if self._references[block_id] == 0}
