"""Logits against transformers, in fp32 on random weights of odd shapes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint
from tests.unit.workers.model.stepping import (
    BLOCK_SIZE,
    LENGTH,
    TOLERANCE,
    distance,
    expected_logits,
    run,
    sequences,
)
from tests.unit.workers.ranks import Ranks

_BASE = {
    "vocab_size": 203,
    "hidden_size": 60,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama, 9 heads over 3, tied": (
        "LlamaConfig",
        {"hidden_size": 90, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "llama, all biases, llama3 rope": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
    ),
    "llama, one kv head, wide heads, linear rope": (
        "LlamaConfig",
        {
            "num_key_value_heads": 1,
            "head_dim": 22,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        },
    ),
    "qwen2, 14 heads over 2, tied": (
        "Qwen2Config",
        {"hidden_size": 84, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2, 3:1": ("Qwen2Config", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "qwen3, yarn, head_dim 14": ("Qwen3Config", {"num_key_value_heads": 3, "head_dim": 14, "rope_parameters": _YARN}),
    "qwen3, yarn with its own factor, biases": (
        "Qwen3Config",
        {
            "head_dim": 32,
            "attention_bias": True,
            "rope_parameters": _YARN | {"attention_factor": 1.25, "beta_fast": 16.0, "truncate": False},
        },
    ),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    import transformers

    name, changes = CASES[request.param]
    config = getattr(transformers, name)(**(_BASE | changes))
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, write_checkpoint(folder, config, seed=len(request.param), max_shard_size="100KB")


@pytest.fixture(scope="module")
def ranks(checkpoint: tuple[Path, Any]) -> Iterator[Ranks]:
    ranks = Ranks(checkpoint[0], block_size=BLOCK_SIZE)
    yield ranks
    ranks.close()


def test_a_whole_prompt(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    (sequence,) = sequences(1, seed=1)
    run(ranks, [(sequence, LENGTH)])
    assert distance(sequence, expected_logits(checkpoint[1], sequence)) <= TOLERANCE


def test_odd_chunks_then_decode(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    (sequence,) = sequences(1, seed=2)
    for count in (5, 1, 13, 16, 7, *[1] * 19):
        run(ranks, [(sequence, count)])
    assert distance(sequence, expected_logits(checkpoint[1], sequence)) <= TOLERANCE


def test_any_mixture_in_one_step(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    all_of_them = sequences(6, seed=3)
    rng = random.Random(4)
    while open_sequences := [s for s in all_of_them if s.num_computed < len(s.token_ids)]:
        chosen = rng.sample(open_sequences, rng.randint(1, len(open_sequences)))
        run(ranks, [(s, min(rng.choice((1, 1, 1, 3, 9)), len(s.token_ids) - s.num_computed)) for s in chosen])
    for sequence in all_of_them:
        assert distance(sequence, expected_logits(checkpoint[1], sequence)) <= TOLERANCE


def test_tensor_parallel(checkpoint: tuple[Path, Any]) -> None:
    """Two or three ranks, where the heads divide."""
    config = checkpoint[1].config
    for size in (2, 3):
        if config.num_key_value_heads % size:
            continue
        ranks = Ranks(checkpoint[0], tensor=size, block_size=BLOCK_SIZE)
        all_of_them = sequences(2, seed=5)
        for counts in ((20, 1), (LENGTH - 22, 1), (1, 1), (1, None)):
            run(ranks, [(s, n or len(s.token_ids) - s.num_computed) for s, n in zip(all_of_them, counts, strict=True)])
        ranks.close()
        for sequence in all_of_them:
            expected = expected_logits(checkpoint[1], sequence)
            assert distance(sequence, expected[: sequence.num_computed]) <= TOLERANCE
