"""A compiler for a small tokenizer, and sequences whose output is guided."""

from __future__ import annotations

from functools import cache

import numpy as np

from scheduler.plan import ScheduledSequence
from scheduler.request import Grammar, GrammarKind, SamplingParams
from tests.unit.cluster.tiny_tokenizers import byte_level, id_of
from tests.unit.workers.sampler.plans import decoding
from workers.guided import Allowed, CompiledGrammar, GrammarCompiler

__all__ = ["EOS", "VOCAB", "allowed_ids", "compiled", "compiler", "encode", "guided", "regex", "text_of"]

EOS = id_of(byte_level(), "</s>")
VOCAB = 421  # wider than the tokenizer, as models' are, and no multiple of anything


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_level().to_str(), VOCAB)


def compiled(grammar: Grammar) -> CompiledGrammar:
    return compiler().submit(grammar, frozenset({EOS})).result(30)


def regex(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.REGEX, text=text)


def encode(text: str) -> list[int]:
    ids: list[int] = byte_level().encode(text, add_special_tokens=False).ids
    return ids


def text_of(ids: list[int]) -> str:
    text: str = byte_level().decode(ids, skip_special_tokens=True)
    return text


def guided(
    grammar: Grammar,
    output: list[int] | None = None,
    *,
    key: str = "k",
    forbidden: frozenset[int] = frozenset(),
    **sampling: object,
) -> ScheduledSequence:
    """A sequence that samples the token behind `output`."""
    own = grammar if isinstance(grammar, CompiledGrammar) else compiled(grammar)
    params = SamplingParams(grammar=own, **sampling)  # type: ignore[arg-type]
    sequence = decoding(params, output=output or [], forbidden=forbidden)
    sequence.key = key
    return sequence


def allowed_ids(allowed: Allowed | None, row: int = 0) -> set[int]:
    assert allowed is not None
    spread = np.unpackbits(allowed.bits[row].view(np.uint8), bitorder="little")
    return set(np.nonzero(spread)[0].tolist())
