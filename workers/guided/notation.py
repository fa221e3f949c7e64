"""A client's grammar in the notation of llguidance."""

from __future__ import annotations

import json

from llguidance import LLMatcher, grammar_from

from scheduler.request import Grammar, GrammarKind

__all__ = ["MAX_CHARS", "GrammarError", "to_llguidance"]

# The library recurses once for each rule of a chain; the compiler's stack holds many times what fits in this.
MAX_CHARS = 65_536
_MAX_WHITESPACE_CHARS = 256
# As json.dumps writes: what models have seen most of, and nothing that can go on without end.
_SEPARATORS = {"item_separator": ", ", "key_separator": ": "}


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says why, for whoever wrote it."""


def to_llguidance(grammar: Grammar) -> str:
    """Checks form and size; whether the rules make sense, compiling tells. Raises GrammarError."""
    if len(grammar.text) > MAX_CHARS:
        raise GrammarError(f"has {len(grammar.text)} characters; at most {MAX_CHARS} are taken")
    if grammar.whitespace is not None and len(grammar.whitespace) > _MAX_WHITESPACE_CHARS:
        raise GrammarError(f"has a whitespace pattern of more than {_MAX_WHITESPACE_CHARS} characters")
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return _schema(grammar.text, grammar.whitespace)
        case GrammarKind.JSON_OBJECT:
            return _schema('{"type": "object"}', grammar.whitespace)
        case GrammarKind.REGEX:
            if not grammar.text:
                raise GrammarError("is empty")
            return LLMatcher.grammar_from_regex(grammar.text)
        case GrammarKind.CHOICE:
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, _choices(grammar.text))))
        case GrammarKind.RULES:
            if not grammar.text.strip():
                raise GrammarError("is empty")
            try:
                return grammar_from("grammar", grammar.text)
            except ValueError as error:
                raise GrammarError(str(error)) from None


def _schema(text: str, whitespace: str | None) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise GrammarError("is not valid JSON") from None
    if not isinstance(value, dict | bool):
        raise GrammarError(f"must be a JSON schema, an object, not {type(value).__name__}")
    options: dict[str, object]
    if whitespace is None:
        options = {"whitespace_flexible": False, **_SEPARATORS}
    else:
        options = {"whitespace_pattern": whitespace}
    try:
        return LLMatcher.grammar_from_json_schema(text, options)  # type: ignore[arg-type]  # a dict of just these keys
    except ValueError as error:
        raise GrammarError(str(error)) from None


def _choices(text: str) -> list[str]:
    try:
        choices = json.loads(text)
    except ValueError:
        raise GrammarError("is not valid JSON") from None
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise GrammarError("must be a list of texts, none of them empty")
    if not choices:
        raise GrammarError("must name at least one text")
    return choices
