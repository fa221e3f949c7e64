"""Logits against transformers, in fp32 on random weights of odd shapes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.unit.workers.ranks import Ranks, Sequence_, step_of

TOLERANCE = 1e-4
LENGTH = 61
BLOCK_SIZE = 4

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


def _sequences(count: int, seed: int) -> list[Sequence_]:
    """Sequences of differing length in shuffled blocks."""
    rng = random.Random(seed)
    block_ids = list(range(count * (LENGTH // BLOCK_SIZE + 1)))
    rng.shuffle(block_ids)
    sequences = []
    for index in range(count):
        length = LENGTH if index == 0 else rng.randint(2, LENGTH)
        blocks = [block_ids.pop() for _ in range(-(-length // BLOCK_SIZE))]
        sequences.append(Sequence_([rng.randrange(200) for _ in range(length)], blocks))
    return sequences


def _expected(model: Any, sequence: Sequence_) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([sequence.token_ids])).logits[0]
    return logits


def _distance(sequence: Sequence_, expected: torch.Tensor) -> float:
    got = torch.cat(sequence.logits)
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


def _run(ranks: Ranks, parts: list[tuple[Sequence_, int]]) -> None:
    """One step with logits of every row, handed back to the sequences."""
    logits = ranks.forward(step_of([(sequence, count, count) for sequence, count in parts]))
    for sequence, count in parts:
        sequence.logits.append(logits[:count])
        sequence.num_computed += count
        logits = logits[count:]
    assert not len(logits)


def test_a_whole_prompt(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    (sequence,) = _sequences(1, seed=1)
    _run(ranks, [(sequence, LENGTH)])
    assert _distance(sequence, _expected(checkpoint[1], sequence)) <= TOLERANCE


def test_odd_chunks_then_decode(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    (sequence,) = _sequences(1, seed=2)
    for count in (5, 1, 13, 16, 7, *[1] * 19):
        _run(ranks, [(sequence, count)])
    assert _distance(sequence, _expected(checkpoint[1], sequence)) <= TOLERANCE


def test_any_mixture_in_one_step(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    sequences = _sequences(6, seed=3)
    rng = random.Random(4)
    while open_sequences := [s for s in sequences if s.num_computed < len(s.token_ids)]:
        chosen = rng.sample(open_sequences, rng.randint(1, len(open_sequences)))
        _run(ranks, [(s, min(rng.choice((1, 1, 1, 3, 9)), len(s.token_ids) - s.num_computed)) for s in chosen])
    for sequence in sequences:
        assert _distance(sequence, _expected(checkpoint[1], sequence)) <= TOLERANCE


def test_tensor_parallel(checkpoint: tuple[Path, Any]) -> None:
    """Two or three ranks, where the heads divide."""
    config = checkpoint[1].config
    for size in (2, 3):
        if config.num_key_value_heads % size:
            continue
        ranks = Ranks(checkpoint[0], tensor=size, block_size=BLOCK_SIZE)
        sequences = _sequences(2, seed=5)
        for counts in ((20, 1), (LENGTH - 22, 1), (1, 1), (1, None)):
            _run(ranks, [(s, n or len(s.token_ids) - s.num_computed) for s, n in zip(sequences, counts, strict=True)])
        ranks.close()
        for sequence in sequences:
            expected = _expected(checkpoint[1], sequence)
            assert _distance(sequence, expected[: sequence.num_computed]) <= TOLERANCE
