"""The block tables of running sequences: one face for the pool of blocks and the prefixes found in it."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.blocks import BlockPool
from scheduler.prefix import PrefixCache
from scheduler.sequence import Sequence
from scheduler.settings import BatcherSettings

__all__ = ["BlockTables"]


class BlockTables:
    """Gives sequences their blocks and takes them back. Ask with `fits` and `can_grow`, then act."""

    def __init__(self, settings: BatcherSettings, *, prefix_key: bytes = b"") -> None:
        self.pool = BlockPool(settings.num_blocks, settings.block_size)
        self.prefixes: PrefixCache | None = None
        if settings.prefix_cache:
            self.prefixes = PrefixCache(
                self.pool,
                wait_tokens=settings.prefix_wait_tokens,
                share_tenants=settings.share_prefixes,
                key=prefix_key,
            )

    def num_new_tokens(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that are not in the cache."""
        if self.prefixes is None:
            return len(sequence.token_ids)
        return len(sequence.token_ids) - self.prefixes.num_found_tokens(sequence)

    def fits(self, sequence: Sequence, num_spare: int, *, num_gained: int = 0) -> bool:
        """Whether the whole history of a waiting sequence finds blocks, `num_spare` others stay free, and
        `num_gained` come back first."""
        found = [] if self.prefixes is None else self.prefixes.find(sequence)
        num_blocks = self.pool.blocks_for(len(sequence.token_ids)) - len(found) + self.pool.num_idle(found)
        return self.pool.can_allocate(num_blocks + num_spare - num_gained)

    def enter(self, sequence: Sequence) -> None:
        """Give a sequence the blocks of its whole history, those that hold its prefix first."""
        found = [] if self.prefixes is None else self.prefixes.find(sequence)
        self.pool.share(found)
        sequence.block_ids = found + self.pool.allocate(self.pool.blocks_for(len(sequence.token_ids)) - len(found))
        if self.prefixes is not None:
            self.prefixes.admit(sequence, found)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; what they hold may still be found."""
        # A prefix is of use without what follows it, not the other way round: the last block goes first.
        self.pool.release(reversed(sequence.block_ids))
        sequence.block_ids = []
        sequence.num_published = 0

    def advance(self, prefills: Iterable[Sequence]) -> None:
        """Let sequences that are not in flight skip what others have computed since they entered."""
        if self.prefixes is not None:
            for sequence in prefills:
                if not sequence.num_scheduled:
                    self.prefixes.advance(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Let the blocks of what is computed be found."""
        if self.prefixes is not None:
            self.prefixes.publish(sequence)

    def claim(self, sequence: Sequence, computing: set[bytes], computed_beside: set[bytes]) -> bool:
        """Add what a sequence has to compute to `computing`; False where it does better to wait for what is there, or
        for what other steps compute."""
        if self.prefixes is None:
            return True
        others = computing | computed_beside if computed_beside else computing
        # What is in flight itself waits for nobody: the hashes may be its own.
        if not sequence.num_scheduled and self.prefixes.awaits(sequence, others):
            return False
        computing.update(self.prefixes.remaining_hashes(sequence))
        return True
