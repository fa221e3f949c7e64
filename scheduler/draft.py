"""A step while it is put together."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.plan import ScheduledSequence, StepPlan
from scheduler.sequence import NO_TOKEN_IDS, Sequence

__all__ = ["Draft", "Flight"]


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that was handed out, its sequences in the plan's order, and when.

    `computing` are the hashes of blocks that its prefills compute.
    """

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    num_tokens: int
    scheduled_s: float
    computing: set[bytes]


class Draft:
    """Collects sequences under the step's limits; those with one token stand first in the plan."""

    def __init__(self, *, num_tokens: int, num_prompt_logits: int) -> None:
        self.num_tokens = 0
        self.num_tokens_left = num_tokens
        self.computing: set[bytes] = set()  # hashes of blocks that this step's prefills have to compute
        self.computed_beside: set[bytes] = set()  # and of those that steps in flight compute
        self._num_prompt_logits_left = num_prompt_logits
        self._decodes: list[ScheduledSequence] = []
        self._chunks: list[ScheduledSequence] = []
        self._decoding: list[Sequence] = []
        self._chunked: list[Sequence] = []

    def room_for(self, sequence: Sequence, to_leave: int = 0) -> int:
        """How many of its remaining tokens fit, with some left; none where rows of logits have run out."""
        num_tokens = max(0, min(sequence.num_remaining, self.num_tokens_left - to_leave))
        if sequence.predicts_prompt:
            num_predicted_again = max(0, sequence.num_prompt_predicted - sequence.num_dispatched)
            num_tokens = min(num_tokens, num_predicted_again + self._num_prompt_logits_left)
        return num_tokens

    def limit(self, num_tokens: int) -> None:
        """What follows may take at most `num_tokens` together."""
        self.num_tokens_left = min(self.num_tokens_left, num_tokens)

    def add_decodes(self, sequences: list[Sequence]) -> None:
        """Schedule the one token that remains of each: `add` for the many, without what only prompts need."""
        self._decodes += [
            ScheduledSequence(
                one.key,
                one.token_ids,
                one.num_prompt_tokens,
                one.num_computed + one.num_scheduled,
                1,
                one.block_ids,
                1,
                True,
                one.sampling,
                one.forbidden_token_ids() if one.sampling.min_tokens else NO_TOKEN_IDS,
            )
            for one in sequences
        ]
        for one in sequences:
            one.num_scheduled += 1
            one.num_awaited += 1
        self._decoding += sequences
        self.num_tokens += len(sequences)
        self.num_tokens_left -= len(sequences)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Schedule the next `num_tokens` tokens, which must fit."""
        samples = num_tokens == sequence.num_remaining
        num_logits = sequence.num_logits(num_tokens)
        scheduled = ScheduledSequence(
            key=sequence.key,
            history=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_computed=sequence.num_dispatched,
            num_tokens=num_tokens,
            block_ids=sequence.block_ids,
            num_logits=num_logits,
            samples=samples,
            sampling=sequence.sampling,
            forbidden_token_ids=sequence.forbidden_token_ids(),
        )
        if num_tokens == 1:
            self._decodes.append(scheduled)
            self._decoding.append(sequence)
        else:
            self._chunks.append(scheduled)
            self._chunked.append(sequence)
        if sequence.predicts_prompt:
            self._num_prompt_logits_left -= num_logits
        sequence.num_scheduled += num_tokens
        sequence.num_awaited += samples
        self.num_tokens += num_tokens
        self.num_tokens_left -= num_tokens

    def close(self, *, generation: int, step: int, now_s: float) -> Flight | None:
        """The finished plan, or None where nothing was scheduled."""
        sequences = (*self._decodes, *self._chunks)
        if not sequences:
            return None
        plan = StepPlan(generation=generation, step=step, sequences=sequences)
        return Flight(plan, (*self._decoding, *self._chunked), self.num_tokens, now_s, self.computing)
