"""What is read from a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.front_door.call import SamplingOptions
from cluster.front_door.model_card import ModelCard

CONFIG = {"max_position_embeddings": 2048, "vocab_size": 1000, "architectures": ["LlamaForCausalLM"]}


def _folder(path: Path, config: dict[str, object], generation: dict[str, object] | None = None) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_a_card(tmp_path: Path) -> None:
    folder = _folder(tmp_path, CONFIG | {"torch_dtype": "bfloat16"})
    card = ModelCard.from_folder(folder, name="llama", aliases=("l",), created_unix_s=5)
    assert (card.max_model_len, card.vocab_size, card.architecture) == (2048, 1000, "LlamaForCausalLM")
    assert (card.dtype, card.created_unix_s, card.defaults) == ("bfloat16", 5, SamplingOptions())
    assert ModelCard.from_folder(folder, name="l", max_model_len=100, dtype="float32").max_model_len == 100


def test_the_configuration_goes_before_the_models_own_defaults(tmp_path: Path) -> None:
    folder = _folder(tmp_path, CONFIG, {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 2})
    card = ModelCard.from_folder(folder, name="m", defaults=SamplingOptions(temperature=0.1, min_p=0.2))
    assert card.defaults == SamplingOptions(temperature=0.1, top_p=0.95, top_k=20, min_p=0.2)


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({"vocab_size": 10}, None, "config.json: max_position_embeddings must be a positive whole number"),
        (CONFIG | {"vocab_size": "many"}, None, "config.json: vocab_size must be a positive whole number"),
        (CONFIG, {"temperature": "hot"}, "generation_config.json: temperature must be a number"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, config: dict[str, object], generation: dict[str, object] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ModelCard.from_folder(_folder(tmp_path, config, generation), name="m")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        ModelCard.from_folder(tmp_path, name="m")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelCard.from_folder(tmp_path, name="m")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold an object"):
        ModelCard.from_folder(tmp_path, name="m")
