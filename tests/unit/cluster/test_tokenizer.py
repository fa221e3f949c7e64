"""What the files of a model folder make of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.front_door.tokenizer import Tokenizer
from tests.unit.cluster.tiny_tokenizers import byte_fallback, byte_level, id_of, write_folder

EOS = {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "bos_token": "<s>"}


def test_the_post_processor_puts_the_first_token_there_once(tmp_path: Path) -> None:
    raw = byte_fallback()
    bos = id_of(raw, "<s>")
    for config in ({}, {**EOS, "add_bos_token": True}, {**EOS, "add_bos_token": False}):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, raw, config=config))
        assert tokenizer.encode("the").count(bos) == 1
        assert tokenizer.encode("the", add_special_tokens=False).count(bos) == 0


def test_add_bos_token_holds_where_the_post_processor_does_not_add_it(tmp_path: Path) -> None:
    raw = byte_level()
    asked = Tokenizer.from_folder(write_folder(tmp_path, raw, config={**EOS, "add_bos_token": True}))
    assert asked.encode("the")[0] == id_of(raw, "<s>")
    assert asked.encode("the")[1:] == asked.encode("the", add_special_tokens=False)
    assert asked.encode("") == [id_of(raw, "<s>")]
    unasked = Tokenizer.from_folder(write_folder(tmp_path, raw, config=EOS))
    assert unasked.encode("the") == unasked.encode("the", add_special_tokens=False)


def test_eos_comes_from_the_first_file_that_names_it(tmp_path: Path) -> None:
    raw = byte_level()
    folder = write_folder(tmp_path, raw, config=EOS)
    assert Tokenizer.from_folder(folder).eos_token_ids == {id_of(raw, "</s>")}
    write_folder(tmp_path, raw, config=EOS)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_folder(folder).eos_token_ids == {7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert Tokenizer.from_folder(folder).eos_token_ids == {8, 9}
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert Tokenizer.from_folder(folder).eos_token_ids == {7}
    (folder / "config.json").unlink()
    write_folder(tmp_path, raw)
    assert Tokenizer.from_folder(folder).eos_token_ids == frozenset()


def test_a_token_named_in_the_config_is_special_even_if_not_declared_so(tmp_path: Path) -> None:
    raw = byte_level()
    think = id_of(raw, "<think>")
    assert Tokenizer(raw).decode([think], True) == "<think>"
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, raw, config={"pad_token": "<think>"}))
    assert tokenizer.decode([think], True) == ""


def test_truncation_and_padding_in_the_file_are_not_obeyed(tmp_path: Path) -> None:
    raw = byte_level().from_str(byte_level().to_str())
    raw.enable_truncation(3)
    raw.enable_padding(length=64)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, raw))
    ids = tokenizer.encode("the quick brown fox jumps over")
    assert tokenizer.decode(ids, True) == "the quick brown fox jumps over"


def test_the_vocabulary_counts_added_tokens() -> None:
    raw = byte_level()
    assert Tokenizer(raw).vocab_size == raw.get_vocab_size() == id_of(raw, "an added one") + 1


def test_lone_surrogates_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="surrogate at character 2"):
        Tokenizer(byte_level()).encode("ab\ud83d")


def test_broken_folders_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
        Tokenizer.from_folder(tmp_path)
