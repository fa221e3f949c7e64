"""What must hold of the sequences of a batcher between two calls."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Several

from scheduler.blocks import BlockPool
from scheduler.sequence import Sequence, State

__all__ = ["check_running", "check_waiting"]


def check_waiting(waiting: Iterable[Sequence]) -> None:
    """Nothing that waits holds anything."""
    for sequence in waiting:
        assert sequence.state in (State.WAITING, State.PREEMPTED)
        assert not sequence.block_ids
        assert sequence.num_computed == sequence.num_scheduled == sequence.num_published == 0


def check_running(running: Several[Sequence], in_flight: set[Sequence], pool: BlockPool) -> None:
    """What runs has blocks for all that is computed and in flight, and writes to no block that others read."""
    assert list(running) == sorted(running, key=lambda sequence: sequence.order)
    pool.check_integrity([sequence.block_ids for sequence in running])
    for sequence in running:
        assert sequence.state is State.RUNNING or sequence in in_flight, sequence.state
        assert (sequence.num_scheduled > 0) == (sequence in in_flight)
        held = len(sequence.block_ids) * pool.block_size
        assert sequence.num_dispatched <= held
        assert sequence.num_remaining > 0 or sequence.state is State.ENDING
        assert 0 <= sequence.num_awaited <= sequence.num_scheduled
        assert not (sequence.first_token_sent and sequence.prompt_logprobs)
        assert sequence.num_published <= sequence.num_computed // pool.block_size
        for block_id in sequence.block_ids[sequence.num_published :]:
            assert pool.hash_of(block_id) is None
            assert pool.num_owned_alone([block_id])
