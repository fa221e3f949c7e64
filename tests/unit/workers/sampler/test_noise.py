"""The hash behaves like chance: uniform, and independent along seed, position and token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.sampler.noise import Noise

VOCAB = 4096
NOISE = Noise(VOCAB, torch.device("cpu"))
PINNED = [-1.9749817848205566, -1.9540770053863525, -0.08358979225158691, -0.689115583896637]  # seed 42, position 7


def uniforms(pairs: list[tuple[int, int]]) -> torch.Tensor:
    seeds, positions = zip(*pairs, strict=True)
    return 1 - torch.exp(NOISE.negative(seeds, positions)).double()


@pytest.mark.parametrize(
    "pairs",
    [
        [(seed, 0) for seed in range(100)],
        [(0, position) for position in range(100)],
        [(-(2**63) + i, i) for i in range(100)],
    ],
    ids=["seeds", "positions", "both"],
)
def test_noise_is_uniform_and_uncorrelated(pairs: list[tuple[int, int]]) -> None:
    u = uniforms(pairs)
    counts = torch.histc(u, bins=100, min=0, max=1)
    expected = u.numel() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 5 * np.sqrt(2 * 99)
    centred = u - 0.5
    variance = 1 / 12
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[1:, 1:] * centred[:-1, :-1]):
        assert abs(product.mean() / variance) < 5 / np.sqrt(product.numel())


def test_chosen_tokens_see_what_the_whole_vocabulary_sees() -> None:
    ids = torch.tensor([[5, 4095, 0], [7, 8, 9]])
    whole = NOISE.negative([1, -2], [3, 4]).clone()
    assert torch.equal(NOISE.negative([1, -2], [3, 4], ids), whole.gather(1, ids))


def test_noise_is_pinned() -> None:
    """A change here would make replays of live requests diverge between versions."""
    drawn = NOISE.negative([42], [7], torch.tensor([[0, 1, 2, 4095]]))[0].tolist()
    assert drawn == pytest.approx(PINNED, rel=1e-6)


def test_noise_is_negative_and_finite() -> None:
    drawn = NOISE.negative(range(300), [0] * 300)
    assert bool((drawn < 0).all())
    assert bool(torch.isfinite(drawn).all())
