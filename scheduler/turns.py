"""How prefills in progress share a step."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Several

from scheduler.sequence import Sequence

__all__ = ["turns"]

_FIRST_SHARE = 4


def turns(prefills: Several[Sequence], num_tokens: int) -> Iterator[tuple[Sequence, int]]:
    """Prefills in the order in which they take tokens, and how many of `num_tokens` each must leave.

    Within the most urgent class the one with the fewest tokens left goes first, so that a short prompt does not wait
    for a long one. The first by its key is left a quarter of the step, so that a long prompt does not wait for an
    endless row of short ones: whatever comes, it moves on, and then the next one is the first.
    """
    if not prefills:
        return
    first = min(prefills, key=lambda sequence: sequence.order)
    to_leave = min(first.num_remaining, max(1, num_tokens // _FIRST_SHARE))
    for sequence in sorted(prefills, key=_turn_of):
        if sequence is first:
            to_leave = 0
        yield sequence, to_leave


def _turn_of(sequence: Sequence) -> tuple[float, ...]:
    return (sequence.request.priority, sequence.num_remaining, *sequence.order)
