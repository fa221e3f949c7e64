"""Models that we have no code for: logits against transformers, in fp32, through the paged cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.workers.autotp.cases import CASES, checkpoint_of
from tests.unit.workers.model.stepping import BLOCK_SIZE, LENGTH, TOLERANCE, distance, expected_logits, run, sequences
from tests.unit.workers.ranks import Ranks, step_of


@pytest.fixture(scope="module", params=sorted(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, checkpoint_of(folder, request.param)


@pytest.fixture(scope="module")
def ranks(checkpoint: tuple[Path, Any]) -> Iterator[Ranks]:
    ranks = Ranks(checkpoint[0], block_size=BLOCK_SIZE)
    yield ranks
    ranks.close()


def test_odd_chunks_then_decode(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    (sequence,) = sequences(1, seed=2)
    for count in (5, 1, 13, 16, 7, *[1] * 19):
        run(ranks, [(sequence, count)])
    expected = expected_logits(checkpoint[1], sequence)
    assert expected.std() > 0.01, "logits that are all alike prove nothing"
    assert distance(sequence, expected) <= TOLERANCE


def test_any_mixture_in_one_step(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    found = sequences(5, seed=3)
    rng = random.Random(4)
    while open_sequences := [s for s in found if s.num_computed < len(s.token_ids)]:
        chosen = rng.sample(open_sequences, rng.randint(1, len(open_sequences)))
        run(ranks, [(s, min(rng.choice((1, 1, 3, 9)), len(s.token_ids) - s.num_computed)) for s in chosen])
    for sequence in found:
        assert distance(sequence, expected_logits(checkpoint[1], sequence)) <= TOLERANCE


def test_only_the_logits_that_are_needed(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    """A prompt without its end yields none, and one with it yields its last; a common prefix is read from the cache."""
    first, second = sequences(2, seed=6)
    assert not len(ranks.forward(step_of([(first, 32, 0)])))
    first.num_computed = 32
    second.token_ids = first.token_ids[:32] + second.token_ids[:8]
    second.block_ids = first.block_ids[: 32 // BLOCK_SIZE] + second.block_ids
    second.num_computed = 32
    logits = ranks.forward(step_of([(first, LENGTH - 32, 1), (second, len(second.token_ids) - 32, 1)]))
    for row, sequence in zip(logits, (first, second), strict=True):
        expected = expected_logits(checkpoint[1], sequence)[-1]
        assert float((row - expected).abs().max()) <= TOLERANCE


def test_the_report_says_what_it_is(checkpoint: tuple[Path, Any], ranks: Ranks) -> None:
    report = ranks.runners[0].report
    assert report.kernels.startswith("transformers 5")
    assert type(checkpoint[1]).__name__ in report.kernels
    total = sum(parameter.nbytes for parameter in checkpoint[1].parameters())
    assert total <= report.weight_bytes <= total * 1.05, "buffers are small"
    config = checkpoint[1].config
    assert report.architecture.startswith(config.model_type)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = report.num_blocks * report.block_size
    assert report.cache_bytes == tokens * 2 * heads * width * config.num_hidden_layers * torch.float32.itemsize
