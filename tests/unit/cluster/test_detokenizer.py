"""What comes out piece by piece is what decoding the whole gives, and never half a character."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.front_door.tokenizer import Tokenizer
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.tiny_tokenizers import CORPUS, KINDS, id_of

Make = Callable[[], tokenizers.Tokenizer]
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
_WRAPPED: dict[Make, Tokenizer] = {}

# Any text, and text that is rich in what is hard: several code points a picture, three and four bytes a character.
hard = st.sampled_from(
    ["😀", "👩‍👩‍👧", "🏳️‍🌈", "中", "文", "한", "é", "e\u0301", " ", "  ", "\n", "\ufffd", "the", "\x00", "ß"]
)
texts = st.one_of(st.text(max_size=40), st.lists(hard, max_size=20).map("".join))


def _wrap(make: Make) -> Tokenizer:
    if make not in _WRAPPED:
        _WRAPPED[make] = Tokenizer(make())
    return _WRAPPED[make]


def _pieces(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@kinds
@given(text=texts)
@settings(deadline=None, derandomize=True)
def test_pieces_of_a_text_join_to_its_decoding(make: Make, text: str) -> None:
    tokenizer = _wrap(make)
    ids = tokenizer.encode(text)
    pieces = _pieces(tokenizer, ids, True)
    assert "".join(pieces) == tokenizer.decode(ids, True) == make().decode(ids, skip_special_tokens=True)


@kinds
@given(data=st.data(), skip=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_pieces_of_any_ids_join_to_their_decoding(make: Make, data: st.DataObject, skip: bool) -> None:
    tokenizer = _wrap(make)
    # Models give ids beyond the tokenizer's vocabulary where their own is padded.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    assert "".join(_pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@given(ids=st.lists(st.integers(0, 399), max_size=40), skip=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_byte_level_decoding_is_the_librarys_whatever_the_bytes(ids: list[int], skip: bool) -> None:
    make = tiny_tokenizers.byte_level
    assert _wrap(make).decode(ids, skip) == make().decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("make", [tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback])
@given(text=texts.filter(lambda text: "\ufffd" not in text))
@settings(deadline=None, derandomize=True)
def test_no_piece_of_good_text_has_half_a_character(make: Make, text: str) -> None:
    tokenizer = _wrap(make)
    assert not any("\ufffd" in piece for piece in _pieces(tokenizer, tokenizer.encode(text), True))


def test_a_character_in_four_tokens_comes_with_the_last() -> None:
    tokenizer = _wrap(tiny_tokenizers.byte_level)
    raw = tiny_tokenizers.byte_level()
    alphabet = {tokenizer.token_bytes(i): i for i in range(raw.get_vocab_size())}
    ids = [alphabet[bytes((byte,))] for byte in "🐟".encode()]
    assert _pieces(tokenizer, ids, True) == ["", "", "", "🐟", ""]


def test_bytes_that_can_be_no_character_are_replaced_at_once_and_open_ones_at_the_end() -> None:
    tokenizer = _wrap(tiny_tokenizers.byte_fallback)
    raw = tiny_tokenizers.byte_fallback()
    byte = {value: id_of(raw, f"<0x{value:02X}>") for value in range(256)}
    assert _pieces(tokenizer, [byte[0xFF], byte[0xE4], byte[0xB8]], True) == ["\ufffd", "", "", "\ufffd"]
    # The good character stays, where the library would replace all of the run.
    assert tokenizer.decode([byte[0xE4], byte[0xB8], byte[0xAD], byte[0xFF]], True) == "中\ufffd"


def test_the_leading_space_is_dropped_only_at_the_beginning_of_a_text() -> None:
    tokenizer = _wrap(tiny_tokenizers.byte_fallback)
    the = id_of(tiny_tokenizers.byte_fallback(), "▁the")
    assert _pieces(tokenizer, [the, the], True) == ["the", " the", ""]
    behind_a_prompt = tokenizer.detokenizer(True, continues=True)
    assert behind_a_prompt.push(the) == " the"


@kinds
def test_special_tokens_are_text_only_when_asked_for(make: Make) -> None:
    tokenizer = _wrap(make)
    end = id_of(make(), "<|im_end|>")
    assert "".join(_pieces(tokenizer, [end], False)) == "<|im_end|>"
    assert "".join(_pieces(tokenizer, [end], True)) == ""


@pytest.mark.parametrize("make", [tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback])
@pytest.mark.parametrize("text", CORPUS)
def test_token_bytes_join_to_the_text(make: Make, text: str) -> None:
    tokenizer = _wrap(make)
    data = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text, add_special_tokens=False))
    assert data.decode().removeprefix(" ") == text.removeprefix(" ")


def test_token_bytes_of_other_decoders_are_those_inside_a_text() -> None:
    assert _wrap(tiny_tokenizers.metaspace).token_bytes(id_of(tiny_tokenizers.metaspace(), "▁the")) == b" the"
    assert _wrap(tiny_tokenizers.word_piece).token_bytes(id_of(tiny_tokenizers.word_piece(), "##s")) == b"s"
    assert _wrap(tiny_tokenizers.word_piece).token_bytes(10_000) == b""
