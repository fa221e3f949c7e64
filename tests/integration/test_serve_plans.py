"""Plans through `shoal serve` and its gRPC door: the same greedy tokens as transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.checkpoints import tiny_deepseek
from tests.integration.served import serving

pytestmark = pytest.mark.timeout(240)

TEXTS = ("A shoal is", "The quick brown fox jumps over", "house by the sea")
NUM_TOKENS = 12


def _expected(model: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        with torch.no_grad():
            for _ in range(NUM_TOKENS):
                ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[-NUM_TOKENS:])
    return found


def test_two_groups_of_two_stages(tmp_path: Path) -> None:
    model = tiny_deepseek(tmp_path / "tiny")
    with serving(model, config="parallel: {data: 2, pipeline: 2}\ninference: {dtype: float32}\n") as served:
        assert served.status().engines[0].plan == "data 2 x pipeline 2 x tensor 1"
        assert [served.tokens(text, max_tokens=NUM_TOKENS) for text in TEXTS] == _expected(model)
