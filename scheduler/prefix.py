"""Which leading blocks of a sequence are in the KV cache already.

A block's hash covers its tokens, the hash of the block before it and, before the first, the tenant: equal hashes mean
equal histories of one tenant. Only full blocks are shared, and a shared block is never written again, so nothing has to
be copied; the tokens behind the last full block are computed by each sequence for itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from scheduler.blocks import BlockPool
from scheduler.sequence import Sequence as OpenSequence

__all__ = ["PrefixCache", "extend_hashes", "hash_of_tenant"]

_DIGEST_SIZE = 16


def hash_of_tenant(tenant: str | None, *, key: bytes = b"") -> bytes:
    """What stands before a chain of blocks; None where all tenants share theirs. `key` has at most 64 bytes."""
    named = b"all" if tenant is None else b"one" + tenant.encode()
    return blake2b(named, digest_size=_DIGEST_SIZE, key=key).digest()


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int, *, root: bytes, key: bytes = b""
) -> None:
    """Append the hashes of the full blocks of `token_ids` that `hashes` lacks."""
    begin, end = len(hashes), len(token_ids) // block_size
    if begin >= end:
        return
    packed = memoryview(array("I", token_ids[begin * block_size : end * block_size]))
    last = hashes[-1] if hashes else root
    for start in range(0, len(packed), block_size):
        block = blake2b(last, digest_size=_DIGEST_SIZE, key=key)
        block.update(packed[start : start + block_size])
        last = block.digest()
        hashes.append(last)


class PrefixCache:
    """Finds and publishes blocks for the batcher's sequences.

    Counts each sequence's tokens, and those it found, once; what a preempted one finds again is not counted.
    """

    def __init__(self, pool: BlockPool, *, wait_tokens: int = 1, share_tenants: bool = False, key: bytes = b"") -> None:
        self.num_hit_tokens = 0
        self.num_query_tokens = 0
        self._pool = pool
        self._wait_tokens = wait_tokens
        self._share_tenants = share_tenants
        self._key = key

    def find(self, sequence: OpenSequence) -> list[int]:
        """The blocks that a waiting sequence could share now, from its first one on."""
        return list(self._find(sequence, 0))

    def num_found_tokens(self, sequence: OpenSequence) -> int:
        return len(self.find(sequence)) * self._pool.block_size

    def admit(self, sequence: OpenSequence, found: list[int]) -> None:
        """The sequence has just got a table that begins with the shared blocks `found`."""
        sequence.num_published = len(found)
        self._skip_to(sequence, len(found))
        if not sequence.was_preempted:
            self.num_query_tokens += len(sequence.token_ids)

    def advance(self, sequence: OpenSequence) -> None:
        """Share what others have published since, in place of what a sequence between two steps was to compute."""
        first = sequence.num_computed // self._pool.block_size
        found = list(self._find(sequence, first))
        if not found:
            return
        self._pool.share(found)
        self._pool.release(sequence.block_ids[first : first + len(found)])
        sequence.block_ids[first : first + len(found)] = found
        sequence.num_published = first + len(found)
        self._skip_to(sequence, first + len(found))

    def remaining_hashes(self, sequence: OpenSequence) -> list[bytes]:
        """Hashes of the full blocks that a sequence has to compute."""
        self._hash(sequence)
        return sequence.block_hashes[sequence.num_computed // self._pool.block_size :]

    def awaits(self, sequence: OpenSequence, computing: set[bytes]) -> bool:
        """Whether enough of the blocks that a sequence would compute next are among these, to share them afterwards."""
        if not computing:
            return False
        first = sequence.num_computed // self._pool.block_size
        least = -(-self._wait_tokens // self._pool.block_size)
        if first + least > self._num_sharable(sequence):
            return False
        return all(block_hash in computing for block_hash in sequence.block_hashes[first : first + least])

    def publish(self, sequence: OpenSequence) -> None:
        """Let every block be found whose tokens are computed."""
        end = sequence.num_computed // self._pool.block_size
        if sequence.num_published >= end:
            return
        self._hash(sequence)
        for index in range(sequence.num_published, end):
            self._pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
        sequence.num_published = end

    def _find(self, sequence: OpenSequence, first: int) -> Iterator[int]:
        for index in range(first, self._num_sharable(sequence)):
            block_id = self._pool.find(sequence.block_hashes[index])
            if block_id is None:
                return
            yield block_id

    def _num_sharable(self, sequence: OpenSequence) -> int:
        """Blocks before the last token, which must be computed, and before rows that prompt logprobs need."""
        self._hash(sequence)
        end = len(sequence.token_ids) - 1
        if sequence.predicts_prompt:
            end = min(end, sequence.num_prompt_predicted)
        return end // self._pool.block_size

    def _hash(self, sequence: OpenSequence) -> None:
        token_ids = sequence.token_ids
        if len(token_ids) // self._pool.block_size > len(sequence.block_hashes):
            tenant = None if self._share_tenants else sequence.request.tenant
            root = hash_of_tenant(tenant, key=self._key)
            extend_hashes(sequence.block_hashes, token_ids, self._pool.block_size, root=root, key=self._key)

    def _skip_to(self, sequence: OpenSequence, num_blocks: int) -> None:
        num_computed = num_blocks * self._pool.block_size
        num_skipped = num_computed - sequence.num_computed
        sequence.num_computed = num_computed
        if not sequence.was_preempted:
            self.num_hit_tokens += num_skipped
            sequence.num_cached_tokens = min(sequence.num_cached_tokens + num_skipped, sequence.num_prompt_tokens)
