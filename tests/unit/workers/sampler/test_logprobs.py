"""Logprobs are the model's own, whatever was done to the logits afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from scheduler.plan import TokenLogprobs
from scheduler.request import SamplingParams
from tests.unit.workers.sampler.plans import decoding, plan
from workers.sampler import Sampler


def rows(count: int, vocab: int = 30) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(1)) * 3


def test_chosen_and_top_come_from_the_raw_distribution() -> None:
    logits = rows(1)
    expected = logits[0].log_softmax(-1)
    favourite = int(expected.argmin())
    sequence = decoding(SamplingParams(temperature=0.0, logit_bias={favourite: 100.0}, logprobs=4))
    (result,) = Sampler().sample(logits, plan(sequence)).sequences
    assert result.token_id == favourite
    assert result.logprobs is not None
    assert result.logprobs.token_id == favourite
    assert result.logprobs.rank == 30
    assert result.logprobs.logprob == pytest.approx(float(expected[favourite]), abs=1e-5)
    values, ids = expected.topk(4)
    assert [token_id for token_id, _ in result.logprobs.top] == ids.tolist()
    assert [value for _, value in result.logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_zero_alternatives_still_give_the_chosen_token() -> None:
    logits = rows(2)
    batch = plan(decoding(SamplingParams(temperature=0.0, logprobs=0)), decoding(SamplingParams(temperature=0.0)))
    with_logprobs, without = Sampler().sample(logits, batch).sequences
    assert with_logprobs.logprobs is not None
    assert with_logprobs.logprobs.rank == 1
    assert with_logprobs.logprobs.top == ()
    assert without.logprobs is None


def test_ties_rank_by_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    sequence = decoding(SamplingParams(temperature=0.0, logit_bias={2: 1.0}, logprobs=2))
    (result,) = Sampler().sample(logits, plan(sequence)).sequences
    assert result.logprobs is not None
    assert (result.logprobs.token_id, result.logprobs.rank) == (2, 2)
    assert [token_id for token_id, _ in result.logprobs.top] == [1, 2]


def test_alternatives_that_all_tie_are_the_lowest_ids() -> None:
    logits = torch.zeros(2, 100)
    logits[0, 50] = 1.0
    batch = [decoding(SamplingParams(temperature=0.0, logprobs=count)) for count in (3, 20)]
    first, second = Sampler().sample(logits, plan(*batch)).sequences
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert [token_id for token_id, _ in first.logprobs.top] == [50, 0, 1]
    assert [token_id for token_id, _ in second.logprobs.top] == list(range(20))


def test_prompt_logprobs_cover_each_predicted_prompt_token_once() -> None:
    """Three chunks of a prompt of seven: six entries, and the last row samples."""
    prompt = [3, 1, 4, 1, 5, 9, 2]
    logits = rows(len(prompt))
    expected = logits.log_softmax(-1)
    whole = dataclasses.replace(
        decoding(SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=1), prompt=prompt, output=()),
        num_computed=0,
    )
    entries: list[TokenLogprobs] = []
    for first, last in ((0, 3), (3, 4), (4, 7)):
        chunk = dataclasses.replace(
            whole, num_computed=first, num_tokens=last - first, num_logits=last - first, samples=last == len(prompt)
        )
        (result,) = Sampler().sample(logits[first:last], plan(chunk)).sequences
        entries += result.prompt_logprobs
        assert (result.token_id is not None) == (last == len(prompt))
    assert [entry.token_id for entry in entries] == prompt[1:]
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(expected[position, prompt[position + 1]]), abs=1e-5)
        assert entry.top[0][0] == int(expected[position].argmax())
        assert len(entry.top) == 2


def test_rows_of_a_mixed_step_go_to_their_owners() -> None:
    """A decode, a chunk without logits, and a last chunk with prompt logprobs share a step."""
    logits = rows(4)
    decode = decoding(SamplingParams(temperature=0.0))
    middle = dataclasses.replace(decode, num_logits=0, samples=False)
    last = dataclasses.replace(
        decoding(SamplingParams(temperature=0.0, prompt_logprobs=0), prompt=[7, 8, 9], output=()),
        num_computed=0,
        num_tokens=3,
        num_logits=3,
    )
    results = Sampler().sample(logits, plan(decode, middle, last)).sequences
    assert [result.token_id for result in results] == [int(logits[0].argmax()), None, int(logits[3].argmax())]
    assert [entry.token_id for entry in results[2].prompt_logprobs] == [8, 9]
    assert results[0].prompt_logprobs == results[1].prompt_logprobs == ()
