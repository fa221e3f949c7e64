"""The sampler against a naive reference, row by row and in company."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.plan import ScheduledSequence, StepResult
from scheduler.request import SamplingParams
from tests.unit.workers.sampler.plans import decoding, plan
from tests.unit.workers.sampler.reference import adjusted, distribution
from workers.sampler import Sampler
from workers.sampler.candidates import _cut_at, _nucleus

VOCAB = 40

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 3, 39, 40, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, -1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -0.25]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
    seed=st.integers(-(2**63), 2**63 - 1),
)
sequences = st.builds(
    decoding,
    params,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    forbidden=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
)


def rows(count: int, vocab: int = VOCAB, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def tokens(result: StepResult) -> list[int]:
    return [sequence.token_id for sequence in result.sequences if sequence.token_id is not None]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(sequences, st.integers(0, 1000))
def test_a_drawn_token_has_probability_in_the_reference(sequence: ScheduledSequence, seed: int) -> None:
    logits = rows(1, seed=seed)
    expected = distribution(logits[0].numpy(), sequence)
    (token_id,) = tokens(Sampler().sample(logits, plan(sequence)))
    assert expected[token_id] > 0
    if sequence.sampling.greedy:
        assert token_id == int(adjusted(logits[0].numpy(), sequence).argmax())


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.5, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.5),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "all"],
)
def test_frequencies_follow_the_distribution(sampling: SamplingParams) -> None:
    """Pearson's chi-square over 20,000 seeds; a wrong filter or a skewed hash is far outside."""
    draws, at_once = 20_000, 500
    row = rows(1, seed=3)
    expected = distribution(row[0].numpy(), decoding(sampling)) * draws
    counts = np.zeros(VOCAB)
    sampler = Sampler()
    for first in range(0, draws, at_once):
        batch = [decoding(dataclasses.replace(sampling, seed=first + i)) for i in range(at_once)]
        np.add.at(counts, tokens(sampler.sample(row.expand(at_once, -1), plan(*batch))), 1)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 8


def test_company_changes_nothing() -> None:
    """Each row alone gives what it gives among others, whichever path the others take."""
    vocab = 50_021
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.9, min_p=0.01),
        SamplingParams(temperature=1.0, top_k=50),
        SamplingParams(temperature=1.3, top_k=300, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=0.95),
        SamplingParams(temperature=2.5, top_p=0.99, logprobs=3),
        SamplingParams(temperature=1.0, top_p=0.9, min_p=0.001, repetition_penalty=1.2, logprobs=0),
    ]
    batch = [decoding(dataclasses.replace(kind, seed=i), output=range(i)) for i, kind in enumerate(kinds)]
    logits = rows(len(batch), vocab, seed=5, scale=4.0)
    sampler = Sampler()
    together = sampler.sample(logits, plan(*batch)).sequences
    backwards = sampler.sample(logits.flip(0), plan(*reversed(batch))).sequences[::-1]
    assert together == backwards
    for index, sequence in enumerate(batch):
        assert sampler.sample(logits[index : index + 1], plan(sequence)).sequences == (together[index],)


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, 300)
    logits[:, 100:] = 1.0
    greedy = decoding(SamplingParams(temperature=0.0))
    one = decoding(SamplingParams(temperature=1.0, top_k=1, seed=7))
    ten = [decoding(SamplingParams(temperature=1.0, top_k=10, seed=seed)) for seed in range(200)]
    assert tokens(Sampler().sample(logits[:2], plan(greedy, one))) == [100, 100]
    drawn = tokens(Sampler().sample(logits[:1].expand(200, -1), plan(*ten)))
    assert set(drawn) == set(range(100, 110))


def test_bf16_logits_give_what_their_fp32_copies_give() -> None:
    logits = rows(4, 2000, scale=5.0).bfloat16()
    batch = plan(
        decoding(SamplingParams(temperature=0.0)),
        decoding(SamplingParams(temperature=1.0, seed=1)),
        decoding(SamplingParams(temperature=1.0, top_k=40, seed=2)),
        decoding(SamplingParams(temperature=0.0, repetition_penalty=1.4, logprobs=2)),
    )
    assert Sampler().sample(logits, batch) == Sampler().sample(logits.float(), batch)


def test_the_caller_keeps_its_logits() -> None:
    logits = rows(2)
    before = logits.clone()
    batch = plan(
        decoding(SamplingParams(temperature=1.0, top_p=0.5, logit_bias={1: 5.0}, presence_penalty=1.0)),
        decoding(SamplingParams(temperature=1.0, min_p=0.5)),
    )
    Sampler().sample(logits, batch)
    assert torch.equal(logits, before)


def test_an_end_token_beyond_the_vocabulary_is_harmless() -> None:
    sequence = decoding(SamplingParams(temperature=0.0), forbidden=frozenset({VOCAB + 5}))
    assert len(tokens(Sampler().sample(rows(1), plan(sequence)))) == 1


def test_a_tiny_temperature_is_greedy() -> None:
    logits = rows(1)
    sequence = decoding(SamplingParams(temperature=1e-38, seed=3))
    assert tokens(Sampler().sample(logits, plan(sequence))) == [int(logits.argmax())]


def test_a_replay_draws_the_same_tokens() -> None:
    """Position counts output tokens, however the prompt was cut and wherever the sequence was started."""
    logits = rows(1, 500)
    sampling = SamplingParams(temperature=1.0, seed=11)
    live = decoding(sampling, prompt=[1, 2, 3], output=[4, 5])
    replayed = dataclasses.replace(live, num_computed=0, num_tokens=5, num_logits=1)
    sampler = Sampler()
    assert live.position == replayed.position == 2
    assert sampler.sample(logits, plan(live)) == sampler.sample(logits, plan(replayed))
    others = [decoding(sampling, output=[4] * n) for n in range(1, 30)]
    assert len(set(tokens(sampler.sample(logits.expand(29, -1), plan(*others))))) > 5


@pytest.mark.parametrize("min_p", [0.0, 1e-3])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999999])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 30.0])
def test_a_nucleus_of_any_size_is_what_a_full_sort_finds(scale: float, top_p: float, min_p: float) -> None:
    """The cut through bins of weights against the cut through the sorted vocabulary."""
    params = SamplingParams(temperature=1.0, top_p=top_p, min_p=min_p)
    logits = (rows(1, 5000, scale=scale) * 4).round() / 4 if scale == 1.0 else rows(1, 5000, scale=scale)
    scaled = logits - logits.max()
    binned = _nucleus(scaled[0], 0, params)
    whole, unresolved = _cut_at(scaled, [0], [params], 5000)
    assert not unresolved
    expected = set(whole.token_ids[whole.weights > 0].tolist())
    found = binned.token_ids[0].tolist()
    assert len(found) == len(set(found))
    # The two add up in different precisions: they may differ by a token at the very edge.
    assert len(expected.symmetric_difference(found)) <= 1 + len(expected) // 1000
