"""Grammars compiled for one model's tokens, in threads of their own, and kept."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from scheduler.request import Grammar
from workers.guided.notation import GrammarError, to_llguidance

__all__ = ["CompiledGrammar", "GrammarCompiler"]

_MAX_KEPT = 64
_MAX_REASON_CHARS = 400
_TIMEOUT_S = 10.0
# The library's own bounds are units of work, so they hold on any machine. These make a mask in 15 ms at the worst.
_LIMITS = LLParserLimits(
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# A chain of rules is followed by recursion: the longest that fits in a grammar takes a part of this.
_STACK_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledGrammar(Grammar):
    """A grammar that masks can be made from: `prototype` is copied for each sequence, never changed.

    `vocab_size` is the width of a mask; `eos_token_ids` may come where the grammar is complete.
    """

    prototype: LLMatcher = field(compare=False, repr=False)
    vocab_size: int = field(compare=False)
    eos_token_ids: tuple[int, ...] = field(compare=False)


_Key = tuple[Grammar, frozenset[int]]


class GrammarCompiler:
    """`tokenizer` is the JSON of a tokenizer.json; it is read with the first grammar. Safe to use from any thread."""

    def __init__(self, tokenizer: str, vocab_size: int, *, num_threads: int = 1, timeout_s: float = _TIMEOUT_S) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._timeout_s = timeout_s
        self._tokenizers: dict[frozenset[int], LLTokenizer] = {}
        self._kept: OrderedDict[_Key, Future[CompiledGrammar]] = OrderedDict()
        self._lock = threading.Lock()
        self._num_threads = num_threads
        self._threads: ThreadPoolExecutor | None = None

    @classmethod
    def from_folder(cls, folder: Path | str, vocab_size: int) -> GrammarCompiler | None:
        """For a model folder; None where it has no tokenizer.json."""
        file = Path(folder) / "tokenizer.json"
        return cls(file.read_text(encoding="utf-8"), vocab_size) if file.is_file() else None

    def submit(self, grammar: Grammar, eos_token_ids: frozenset[int]) -> Future[CompiledGrammar]:
        """Compiles a grammar, or takes it from those kept. The future raises GrammarError."""
        key = (Grammar(kind=grammar.kind, text=grammar.text, whitespace=grammar.whitespace), eos_token_ids)
        with self._lock:
            future = self._kept.get(key)
            if future is None:
                if self._threads is None:
                    self._threads = _threads(self._num_threads)
                future = self._kept[key] = self._threads.submit(self._compile, *key)
                if len(self._kept) > _MAX_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
        return future

    async def compile(self, grammar: Grammar, eos_token_ids: frozenset[int]) -> CompiledGrammar:
        """The same without blocking an event loop. Raises GrammarError."""
        future = self.submit(grammar, eos_token_ids)
        if future.done():
            return future.result()
        try:
            async with asyncio.timeout(self._timeout_s):
                # Others may wait for the same one.
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            raise GrammarError(f"takes more than {self._timeout_s:g} s to compile") from None

    def close(self) -> None:
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar, eos_token_ids: frozenset[int]) -> CompiledGrammar:
        notation = to_llguidance(grammar)
        tokenizer = self._tokenizer(eos_token_ids)
        matcher = LLMatcher(tokenizer, notation, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # builds what every first mask needs, here and not in a step
        if matcher.is_error():
            raise GrammarError(f"cannot be used: {_short(matcher.get_error())}")
        return CompiledGrammar(
            kind=grammar.kind,
            text=grammar.text,
            whitespace=grammar.whitespace,
            prototype=matcher,
            vocab_size=self._vocab_size,
            eos_token_ids=tuple(tokenizer.eos_tokens),
        )

    def _tokenizer(self, eos_token_ids: frozenset[int]) -> LLTokenizer:
        """One for each set of ends, of which a model has one."""
        with self._lock:
            known = self._tokenizers.get(eos_token_ids)
        if known is None:
            known = _read_tokenizer(self._source, self._vocab_size, eos_token_ids)
            with self._lock:
                self._tokenizers = {eos_token_ids: known}
        return known


def _read_tokenizer(source: str, vocab_size: int, eos_token_ids: frozenset[int]) -> LLTokenizer:
    try:
        plain = {**json.loads(source), "truncation": None, "padding": None}
        return LLTokenizer(json.dumps(plain), n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)
    except Exception as error:  # the library raises nothing narrower
        raise GrammarError(f"cannot be used with this model's tokenizer: {_short(str(error))}") from error


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= _MAX_REASON_CHARS else line[: _MAX_REASON_CHARS - 3] + "..."


def _threads(count: int) -> ThreadPoolExecutor:
    """Threads with a deep stack. Its size can only be set for all threads that begin, so they begin here."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="grammar")
    begun = threading.Barrier(count + 1)
    before = threading.stack_size(_STACK_BYTES)
    try:
        for _ in range(count):
            pool.submit(begun.wait)
    finally:
        threading.stack_size(before)
    begun.wait()
    return pool
