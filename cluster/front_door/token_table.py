"""The bytes that each token stands for, where a decoder is a table and a concatenation.

That holds for the two kinds of tokenizer that nearly every model has: byte-level BPE, whose tokens are spelled in 256
stand-in characters, and SentencePiece's with byte fallback, where U+2581 is a space and `<0x0A>` a byte. For such a
tokenizer an output's text is its tokens' bytes, joined and decoded. Other decoders have no table (`TokenTable.build`
gives None) and are asked instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer as RawTokenizer

__all__ = ["TokenTable", "join"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenTable:
    """`bytes[i]` are token i's; `texts[i]` is the same as text, None where it is not whole characters.

    `texts_without_special` has special tokens empty. `leading_spaces` is how many spaces, at most, the decoder takes
    off the beginning of a whole text: SentencePiece puts one in front of what it encodes.
    """

    bytes: tuple[bytes, ...]
    texts: tuple[str | None, ...]
    texts_without_special: tuple[str | None, ...]
    leading_spaces: int

    @classmethod
    def build(cls, tokenizer: RawTokenizer, special: frozenset[int]) -> TokenTable | None:
        """None where this decoder is more than a table."""
        rule = _rule(tokenizer)
        if rule is None:
            return None
        to_bytes, leading_spaces = rule
        tokens: Mapping[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        data = [b""] * (max(tokens.values(), default=-1) + 1)
        for token, token_id in tokens.items():
            data[token_id] = to_bytes(token)
        texts = tuple(_whole_text(value) for value in data)
        plain = tuple("" if i in special else text for i, text in enumerate(texts))
        return cls(tuple(data), texts, plain, leading_spaces)


def _rule(tokenizer: RawTokenizer) -> tuple[Callable[[str], bytes], int] | None:
    """How a token becomes bytes, and how many leading spaces are stripped."""
    if tokenizer.decoder is None:
        return None
    state = json.loads(tokenizer.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    steps = [step for step in steps if step["type"] != "Fuse"]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_rule(), 0
    leading_spaces = 0
    if kinds[-1:] == ["Strip"]:
        strip = steps.pop()
        if strip["content"] != " " or strip["stop"] != 0:
            return None
        leading_spaces = strip["start"]
    if [step["type"] for step in steps] == ["Replace", "ByteFallback"]:
        pattern = steps[0]["pattern"].get("String")
        if pattern is not None:
            return _byte_fallback_rule(pattern, steps[0]["content"]), leading_spaces
    return None


def _byte_level_rule() -> Callable[[str], bytes]:
    """GPT-2's spelling: printable Latin-1 stands for itself, the other 68 bytes for the characters from U+0100 on.

    A token with any other character in it (an added token) stands for its own UTF-8.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {0x100 + at: byte for at, byte in enumerate(others)}
    table.update(dict.fromkeys(others, 0x100))  # no token spells a byte this way: make Latin-1 refuse it

    def to_bytes(token: str) -> bytes:
        try:
            return token.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()

    return to_bytes


def _byte_fallback_rule(pattern: str, content: str) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        text = token.replace(pattern, content)
        found = _BYTE_TOKEN.fullmatch(text)
        return bytes((int(found[1], 16),)) if found else text.encode()

    return to_bytes


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def join(table: TokenTable, ids: Iterable[int], *, skip_special_tokens: bool) -> bytes:
    """The bytes of a whole output; ids without a token have none."""
    texts = table.texts_without_special if skip_special_tokens else table.texts
    size = len(texts)
    return b"".join(table.bytes[i] for i in ids if i < size and texts[i] != "")
