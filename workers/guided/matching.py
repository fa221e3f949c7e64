"""How far sequences have come in their grammars, and what may follow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from scheduler.plan import ScheduledSequence
from workers.guided.compiler import CompiledGrammar

__all__ = ["Allowed", "End", "Matching"]

_MIN_KEPT = 64
_BROKEN = "the grammar cannot be followed any further"
_DEAD_END = "the grammar leads to a place where none of the model's tokens fits"


class _Place:
    """One sequence's place in its grammar: a function of the grammar and the tokens, however they came."""

    def __init__(self, grammar: CompiledGrammar, history: Sequence[int]) -> None:
        self.grammar = grammar
        self.history = history
        self.matcher = grammar.prototype.deep_copy()
        self.num_consumed = 0
        self.bits: NDArray[np.int32] | None = None  # of the next token

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    def end(self) -> End | None:
        if self.matcher.is_error():
            return End(complete=False, error=f"{_BROKEN}: {self.matcher.get_error()[:200]}")
        if self.complete:
            return End(complete=True)
        if self.bits is None or not self.bits.any():
            return End(complete=self.matcher.is_accepting(), error="" if self.matcher.is_accepting() else _DEAD_END)
        return None

    def follow(self, sequence: ScheduledSequence) -> None:
        """Comes to the end of what the sequence has put out."""
        self.bits = None
        start, num_output = sequence.num_prompt_tokens, sequence.position
        if num_output < self.num_consumed:
            self.matcher = self.grammar.prototype.deep_copy()
            self.num_consumed = 0
        if num_output > self.num_consumed:
            self.matcher.consume_tokens(list(sequence.history[start + self.num_consumed : start + num_output]))
            self.num_consumed = num_output

    def take(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)
        self.num_consumed += 1


@dataclass(frozen=True, slots=True)
class End:
    """Why no token may follow: the grammar is complete or, where it is not, what is wrong."""

    complete: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class Allowed:
    """For some `rows` of a step, which tokens may come: bit i of a row's `bits` [rows, words] stands for token i, the
    lowest of a word first."""

    rows: list[int]
    bits: NDArray[np.int32]


class Matching:
    """The places of a group's guided sequences. What it keeps saves time only: all of it follows from the histories."""

    def __init__(self) -> None:
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._executor = LLExecutor(1)  # one call for all rows, in the thread that asks

    def __len__(self) -> int:
        return len(self._places)

    def follow(self, sequences: Sequence[ScheduledSequence]) -> list[End | None]:
        """Goes to where these, which all have a grammar, are by now: their ends, where that is one."""
        places = [self._place(sequence) for sequence in sequences]
        # Masks are made here already: only from them is it known that no token fits.
        going = [place for place in places if not place.matcher.is_stopped()]
        if going:
            self._fill(going)
        for place, sequence in zip(places, sequences, strict=True):
            if place.bits is not None:
                _restrict(place, sequence)
        self._forget(len(places))
        return [place.end() for place in places]

    def allowed(self, sequences: Sequence[ScheduledSequence]) -> Allowed | None:
        """What may come next in those of `sequences` that have a grammar, for each of which `follow` found no end.

        Tokens that may not come yet (`forbidden_token_ids`) are left out unless nothing else could come. An end of
        sequence may come where the grammar could end, but not with `ignore_eos`.
        """
        rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.grammar is not None]
        if not rows:
            return None
        masks = [self._places[sequences[row].key].bits for row in rows]
        return Allowed(rows, np.stack([mask for mask in masks if mask is not None]))

    def take(self, sequence: ScheduledSequence, token_id: int) -> bool:
        """Goes on by the token that was chosen; whether the grammar is complete with it."""
        # Between its mask and its token others may have been followed, so that it was forgotten.
        place = self._places.get(sequence.key) or self._place(sequence)
        place.take(token_id)
        return place.complete

    def _place(self, sequence: ScheduledSequence) -> _Place:
        grammar = sequence.sampling.grammar
        assert isinstance(grammar, CompiledGrammar), "the grammar was not compiled"
        place = self._places.get(sequence.key)
        if place is None or place.grammar is not grammar or place.history is not sequence.history:
            place = self._places[sequence.key] = _Place(grammar, sequence.history)
        self._places.move_to_end(sequence.key)
        place.follow(sequence)
        return place

    def _fill(self, places: list[_Place]) -> None:
        """Makes the masks of all in one call."""
        words = (places[0].grammar.vocab_size + 31) // 32
        bits = np.zeros((len(places), words), dtype=np.int32)
        fill_next_token_bitmask_par(self._executor, [(place.matcher, at) for at, place in enumerate(places)], bits)
        for row, place in zip(bits, places, strict=True):
            place.bits = row

    def _forget(self, num_used: int) -> None:
        """Drops those that were used the longest ago; who comes back is followed from its beginning."""
        while len(self._places) > max(_MIN_KEPT, 2 * num_used):
            self._places.popitem(last=False)


def _restrict(place: _Place, sequence: ScheduledSequence) -> None:
    """Takes what else may not come out of a fresh mask."""
    assert place.bits is not None
    if sequence.sampling.ignore_eos:
        _clear(place.bits, place.grammar.eos_token_ids)
    if sequence.forbidden_token_ids:
        rest = place.bits.copy()
        _clear(rest, sequence.forbidden_token_ids)
        if rest.any():
            place.bits = rest


def _clear(row: NDArray[np.int32], token_ids: Iterable[int]) -> None:
    words = row.view(np.uint32)
    for token_id in token_ids:
        if token_id < 32 * len(words):
            words[token_id >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token_id & 31)))
