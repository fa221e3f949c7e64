"""Runs sequences through ranks in any chunks, and measures how far their logits are from an oracle's."""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.unit.workers.ranks import Ranks, Sequence_, step_of

__all__ = ["BLOCK_SIZE", "LENGTH", "TOLERANCE", "distance", "expected_logits", "run", "sequences"]

TOLERANCE = 1e-4
LENGTH = 61
BLOCK_SIZE = 4


def sequences(count: int, seed: int) -> list[Sequence_]:
    """Sequences of differing length in shuffled blocks."""
    rng = random.Random(seed)
    block_ids = list(range(count * (LENGTH // BLOCK_SIZE + 1)))
    rng.shuffle(block_ids)
    found = []
    for index in range(count):
        length = LENGTH if index == 0 else rng.randint(2, LENGTH)
        blocks = [block_ids.pop() for _ in range(-(-length // BLOCK_SIZE))]
        found.append(Sequence_([rng.randrange(200) for _ in range(length)], blocks))
    return found


def expected_logits(model: Any, sequence: Sequence_) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([sequence.token_ids])).logits[0]
    return logits


def distance(sequence: Sequence_, expected: torch.Tensor) -> float:
    got = torch.cat(sequence.logits)
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


def run(ranks: Ranks, parts: list[tuple[Sequence_, int]]) -> None:
    """One step with logits of every row, handed back to the sequences."""
    logits = ranks.forward(step_of([(sequence, count, count) for sequence, count in parts]))
    for sequence, count in parts:
        sequence.logits.append(logits[:count])
        sequence.num_computed += count
        logits = logits[count:]
    assert not len(logits)
