"""Log-probabilities in OpenAI's two styles, and the prompt's as vLLM has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from cluster.front_door.text import IncrementalText, TextCodec
from scheduler.plan import TokenLogprobs

__all__ = ["LegacyLogprobs", "Spelling", "chat_logprobs", "joined", "prompt_logprobs"]

_LEAST = -9999.0  # JSON has no infinity


class Spelling:
    """Token ids as the strings that name them."""

    def __init__(self, codec: TextCodec, *, as_ids: bool) -> None:
        self._as_ids = as_ids
        self._bytes = lru_cache(maxsize=4096)(codec.token_bytes)

    def bytes(self, token_id: int) -> bytes:
        return self._bytes(token_id)

    def text(self, token_id: int) -> str:
        """May hold U+FFFD for part of a character; the bytes tell."""
        return f"token_id:{token_id}" if self._as_ids else self._bytes(token_id).decode("utf-8", "replace")

    def key(self, token_id: int) -> str:
        """Keeps tokens that are parts of characters apart, as OpenAI does: `bytes:\\xf0\\x9f`."""
        if self._as_ids:
            return f"token_id:{token_id}"
        data = self._bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LegacyLogprobs:
    """The style of /v1/completions, for one choice: parallel lists, and where each token begins in the text."""

    def __init__(self, text: IncrementalText, spelling: Spelling, *, num_top: int) -> None:
        self._spelling = spelling
        self._num_top = num_top
        self._text = text
        self._offset = 0

    def render(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, object]:
        """The next tokens of the text; an entry is None for the first token of a prompt."""
        key = self._spelling.key
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._text.push(token_id))
        return {
            "tokens": [key(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top = {self._spelling.key(token_id): _finite(logprob) for token_id, logprob in entry.top[: self._num_top]}
        top.setdefault(self._spelling.key(entry.token_id), _finite(entry.logprob))
        return top


def joined(first: dict[str, object], second: dict[str, object]) -> dict[str, object]:
    """Two results of `LegacyLogprobs.render`, one behind the other."""
    return {name: [*value, *second[name]] for name, value in first.items()}  # type: ignore[misc]


def chat_logprobs(spelling: Spelling, entries: Sequence[TokenLogprobs]) -> dict[str, object]:
    """The style of /v1/chat/completions."""

    def named(token_id: int, logprob: float) -> dict[str, object]:
        data = list(spelling.bytes(token_id))
        return {"token": spelling.text(token_id), "logprob": _finite(logprob), "bytes": data}

    content = [
        {**named(entry.token_id, entry.logprob), "top_logprobs": [named(*each) for each in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(spelling: Spelling, entries: Sequence[TokenLogprobs | None]) -> list[dict[str, object] | None]:
    """For each token of the prompt, by id: the likeliest, and its own if it is not among them."""
    return [None if entry is None else _by_id(spelling, entry) for entry in entries]


def _by_id(spelling: Spelling, entry: TokenLogprobs) -> dict[str, object]:
    ranked = [(token_id, logprob, at + 1) for at, (token_id, logprob) in enumerate(entry.top)]
    ranked.append((entry.token_id, entry.logprob, entry.rank))
    return {
        str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": spelling.text(token_id)}
        for token_id, logprob, rank in ranked
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST) if not math.isnan(logprob) else _LEAST
