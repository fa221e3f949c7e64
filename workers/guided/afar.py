"""Grammars of sequences whose tokens another rank samples: it gets masks and knows no grammar.

    opened = afar.open(plan)          before the rows are sent: masks, and who may not go on
    result = afar.close(opened, ...)  when the tokens have come back

Between the two, steps of other sequences may be opened and closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.plan import ScheduledSequence, StepPlan, StepResult
from workers.guided.matching import End, Matching

__all__ = ["Afar", "Opened"]


@dataclass(frozen=True, slots=True)
class Opened:
    """The guided sequences of a step, by index in its plan: those that `ended` sample nothing, of the others `masks`
    say which tokens may come, in 32-bit words in this machine's order, the lowest bit first."""

    ended: Mapping[int, End]
    going: Mapping[int, ScheduledSequence]
    masks: Mapping[int, bytes]


class Afar:
    """Owned by one thread. What it keeps saves time only."""

    def __init__(self) -> None:
        self._matching = Matching()

    def open(self, plan: StepPlan) -> Opened:
        guided = {
            index: sequence
            for index, sequence in enumerate(plan.sequences)
            if sequence.samples and sequence.sampling.grammar is not None
        }
        if not guided:
            return Opened({}, {}, {})
        ends = dict(zip(guided, self._matching.follow(list(guided.values())), strict=True))
        ended = {index: end for index, end in ends.items() if end is not None}
        going = {index: sequence for index, sequence in guided.items() if index not in ended}
        allowed = self._matching.allowed(list(going.values()))
        rows = () if allowed is None else allowed.bits
        return Opened(ended, going, {index: row.tobytes() for index, row in zip(going, rows, strict=True)})

    def close(self, opened: Opened, result: StepResult) -> StepResult:
        """`result` with what the grammars say of it."""
        for index, end in opened.ended.items():
            result.sequences[index].complete, result.sequences[index].error = end.complete, end.error
        for index, sequence in opened.going.items():
            made = result.sequences[index]
            assert made.token_id is not None, "a row with a mask has a token"
            made.complete = self._matching.take(sequence, made.token_id)
        return result
