"""Output tokens to text, as they come, never half a character.

What the pushes and the finish return, joined, is exactly what decoding the whole output returns. A character whose
last bytes have not come is held back; bytes that are no UTF-8 become U+FFFD once it is certain that they are none,
which for the last ones is at the finish.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable
from typing import Protocol

from cluster.front_door.token_table import TokenTable

__all__ = ["Detokenizer", "TableDetokenizer", "WindowDetokenizer"]

_UNDECIDED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """The text of one output stream."""

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; often empty in the middle of a character."""
        ...

    def finish(self) -> str:
        """What is left when no token follows."""
        ...


class TableDetokenizer:
    """For tokenizers whose tokens are bytes; a push is a look-up unless a character is open."""

    __slots__ = ("_bytes", "_leading_spaces", "_pending", "_size", "_texts")

    def __init__(self, table: TokenTable, *, skip_special_tokens: bool, continues: bool = False) -> None:
        self._bytes = table.bytes
        self._texts = table.texts_without_special if skip_special_tokens else table.texts
        self._size = len(self._texts)
        self._pending = b""
        self._leading_spaces = 0 if continues else table.leading_spaces

    def push(self, token_id: int) -> str:
        # A model's vocabulary can be padded beyond its tokenizer's: such ids have no text.
        text = self._texts[token_id] if token_id < self._size else ""
        if text == "":
            return ""
        if text is None or self._pending:
            data = self._pending + self._bytes[token_id]
            text, consumed = utf_8_decode(data, "replace", False)
            self._pending = data[consumed:]
        return self._strip(text) if self._leading_spaces else text

    def finish(self) -> str:
        data, self._pending = self._pending, b""
        text = data.decode("utf-8", "replace")
        return self._strip(text) if self._leading_spaces else text

    def _strip(self, text: str) -> str:
        while self._leading_spaces and text.startswith(" "):
            text = text[1:]
            self._leading_spaces -= 1
        if text:
            self._leading_spaces = 0
        return text


class WindowDetokenizer:
    """For any other tokenizer: decodes the last few tokens with and without the new one.

    The tokens of the piece before stay in the window as context, because a decoder may treat the first token it sees
    in its own way. Exact for decoders where a token's text depends on its neighbours only.
    """

    __slots__ = ("_decode", "_is_text", "_prefix", "_window", "_window_start")

    def __init__(self, decode: Callable[[list[int]], str], is_text: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_text = is_text
        self._window: list[int] = []
        self._window_start = 0  # where the tokens begin whose text was not returned
        self._prefix = ""  # the text of the tokens before

    def push(self, token_id: int) -> str:
        if not self._is_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_UNDECIDED):
            return ""
        new = text[len(self._prefix) :]
        self._window = self._window[self._window_start :]
        self._window_start = len(self._window)
        self._prefix = self._decode(self._window)
        return new

    def finish(self) -> str:
        return self._decode(self._window)[len(self._prefix) :] if self._window else ""
