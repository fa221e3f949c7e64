"""A model folder's tokenizer.json, and what the files beside it say about its special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer

from cluster.front_door.detokenizer import Detokenizer, TableDetokenizer, WindowDetokenizer
from cluster.front_door.special_tokens import named_special_tokens, read_eos_token_ids, read_tokenizer_config
from cluster.front_door.token_table import TokenTable, join

__all__ = ["Tokenizer"]


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads; `encode` leaves the interpreter's lock.

    `bos_token_id` is set where the folder asks for it in front of every text (`add_bos_token`) in addition to what
    tokenizer.json itself adds.
    """

    def __init__(
        self,
        raw: RawTokenizer,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        special_token_ids: frozenset[int] = frozenset(),
        bos_token_id: int | None = None,
    ) -> None:
        # Some published files truncate or pad; a prompt is never changed behind the client's back.
        raw.no_truncation()
        raw.no_padding()
        self._raw = raw
        self._bos_token_id = bos_token_id
        declared = (i for i, token in raw.get_added_tokens_decoder().items() if token.special)
        self.special_token_ids = special_token_ids | frozenset(declared)
        self.eos_token_ids = eos_token_ids
        self._table = TokenTable.build(raw, self.special_token_ids)
        self.vocab_size: int = max(raw.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Reads a folder in Hugging Face layout; raises ValueError naming the file that is missing or wrong."""
        path = Path(folder)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError("tokenizer.json is missing from the model's folder")
        try:
            raw = RawTokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
        config = read_tokenizer_config(path)
        named = {
            name: token_id
            for name, token in named_special_tokens(config).items()
            if (token_id := raw.token_to_id(token)) is not None
        }
        eos = read_eos_token_ids(path)
        if not eos and "eos_token" in named:
            eos = frozenset({named["eos_token"]})
        return cls(
            raw,
            eos_token_ids=eos,
            special_token_ids=frozenset(named.values()),
            bos_token_id=named.get("bos_token") if config.get("add_bos_token") is True else None,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises ValueError for text that is no Unicode (lone surrogates)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a lone surrogate at character {error.start}") from None
        # Of the library's ways in, the batched one releases the interpreter's lock and the fast one skips offsets.
        (encoding,) = self._raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        bos = self._bos_token_id
        if add_special_tokens and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole output.

        Equal to what the tokenizers library gives but in one case: of a run of byte-fallback tokens that is not
        wholly UTF-8, the characters that are good stay, where the library replaces every byte.
        """
        if self._table is None:
            return self._raw_decode([i for i in ids if self._is_text(i, skip_special_tokens)])
        text = join(self._table, ids, skip_special_tokens=skip_special_tokens).decode("utf-8", "replace")
        strip = min(self._table.leading_spaces, len(text) - len(text.lstrip(" ")))
        return text[strip:]

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, in bytes, which may be part of a character; none for an id without token."""
        if token_id >= self.vocab_size:
            return b""
        if self._table is not None:
            return self._table.bytes[token_id]
        # Behind another token: the first one of a text may lose its leading space.
        twice = self._raw_decode([token_id, token_id])
        return twice[len(self._raw_decode([token_id])) :].encode()

    def detokenizer(self, skip_special_tokens: bool = True, *, continues: bool = False) -> Detokenizer:
        """For one output stream; `continues` where it goes on behind a text, so that a leading space is meant."""
        if self._table is not None:
            return TableDetokenizer(self._table, skip_special_tokens=skip_special_tokens, continues=continues)
        return WindowDetokenizer(self._raw_decode, lambda i: self._is_text(i, skip_special_tokens))

    def _raw_decode(self, ids: list[int]) -> str:
        text: str = self._raw.decode(ids, skip_special_tokens=False)
        return text

    def _is_text(self, token_id: int, skip_special_tokens: bool) -> bool:
        return token_id < self.vocab_size and not (skip_special_tokens and token_id in self.special_token_ids)
