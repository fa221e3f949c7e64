"""Tokens and logprobs of a row have the same bits alone and in any batch, for vocabularies of odd sizes."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from scheduler.plan import ScheduledSequence
from scheduler.request import SamplingParams
from tests.unit.workers.sampler.plans import decoding, plan
from workers.sampler import Sampler
from workers.sampler.noise import Noise

KINDS = (
    SamplingParams(temperature=0.0, logprobs=5),
    SamplingParams(logprobs=0),
    SamplingParams(temperature=0.7, top_p=0.9, logprobs=2),
    SamplingParams(top_k=20, repetition_penalty=1.2, logprobs=1),
    SamplingParams(min_p=0.02, frequency_penalty=0.5, logprobs=20),
)


@pytest.mark.parametrize("vocab_size", [203, 10_007])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_alone_and_in_any_batch(vocab_size: int, threads: int) -> None:
    rng = random.Random(vocab_size)
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(0)) * 2
    rows: list[ScheduledSequence] = [
        decoding(dataclasses.replace(KINDS[row % len(KINDS)], seed=row), output=range(4, 5 + row)) for row in range(40)
    ]
    alone = [Sampler().sample(logits[row : row + 1], plan(rows[row])).sequences[0] for row in range(40)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(10):
            chosen = rng.sample(range(40), rng.randint(2, 33))
            results = Sampler().sample(logits[chosen], plan(*(rows[row] for row in chosen))).sequences
            assert list(results) == [alone[row] for row in chosen]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocab_size", [61, 203, 10_007, 50_257])
def test_what_the_sampler_is_made_of_treats_every_element_alike(vocab_size: int) -> None:
    """A draw that differs by one bit rarely shows in the token, so the operations are looked at themselves."""
    x = torch.randn(21, vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    for act in (torch.exp, lambda part: torch.log_softmax(part, -1)):
        whole = act(x)
        for first, last in ((0, 1), (3, 4), (5, 7), (8, 21)):
            assert torch.equal(act(x[first:last]), whole[first:last])
    noise = Noise(vocab_size, torch.device("cpu"))
    seeds = range(16)
    together = noise.negative(seeds, seeds).clone()
    for seed in seeds:
        assert torch.equal(noise.negative([seed], [seed])[0], together[seed])
