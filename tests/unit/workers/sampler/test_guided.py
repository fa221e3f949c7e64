"""Guided rows: what is drawn is the likeliest of what the grammar allows, and nobody else's row notices."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from scheduler.plan import ScheduledSequence, SequenceResult
from scheduler.request import SamplingParams
from tests.unit.workers.guided.support import EOS, VOCAB, allowed_ids, compiled, encode, guided, regex, text_of
from tests.unit.workers.sampler.plans import decoding, plan
from workers.guided import Matching
from workers.sampler import Sampler


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def sample(sampler: Sampler, logits: torch.Tensor, *sequences: ScheduledSequence) -> list[SequenceResult]:
    return list(sampler.sample(logits, plan(*sequences)).sequences)


def allowed(sequence: ScheduledSequence) -> list[int]:
    matching = Matching()
    matching.follow([sequence])
    return sorted(allowed_ids(matching.allowed([sequence])))


def go_on(sequence: ScheduledSequence, token_id: int) -> None:
    assert isinstance(sequence.history, list)
    sequence.history.append(token_id)
    sequence.num_computed += 1


def test_greedy_takes_the_likeliest_token_that_may_come() -> None:
    for seed in range(20):
        sequence = guided(regex(r"[a-z]{2,9}[0-9]*"), temperature=0.0)
        logits = rows(1, seed)
        (made,) = sample(Sampler(), logits, sequence)
        choices = allowed(sequence)
        assert made.token_id == choices[int(logits[0, choices].argmax())]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.2},
        {"top_p": 0.999, "temperature": 5.0},
        {"min_p": 0.5},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": {EOS: 100.0}},
    ],
    ids=str,
)
def test_whatever_else_is_asked_for_only_what_may_come_is_drawn(sampling: dict[str, Any]) -> None:
    for seed in range(20):
        sequence = guided(regex("(the|dog|fox)+x"), encode("the"), seed=seed, **sampling)
        (made,) = sample(Sampler(), rows(1, seed), sequence)
        assert made.token_id in allowed(sequence)


def test_other_rows_stay_as_they_are_and_each_guided_row_follows_its_own_grammar() -> None:
    plain = [decoding(SamplingParams(seed=number, top_k=number % 3)) for number in range(4)]
    alone = [sample(Sampler(), rows(4)[n : n + 1], one)[0].token_id for n, one in enumerate(plain)]
    mine = [guided(regex("a+"), key="a"), guided(regex("[0-9]+"), key="b", temperature=0.0)]
    logits = torch.cat([rows(4), rows(2, 1)])
    order = [4, 0, 1, 5, 2, 3]
    sequences = [[*plain, *mine][index] for index in order]
    made = sample(Sampler(), logits[order], *sequences)
    by_index = dict(zip(order, made, strict=True))
    assert [by_index[n].token_id for n in range(4)] == alone
    assert set(text_of([by_index[4].token_id or 0])) == {"a"}
    assert text_of([by_index[5].token_id or 0]).isdigit()


def test_the_last_token_says_so_and_nothing_follows_it() -> None:
    sampler = Sampler()
    sequence = guided(regex("ab"), temperature=0.0)
    made = []
    for step in range(9):
        (result,) = sample(sampler, rows(1, step), sequence)
        made.append(result)
        if result.token_id is not None:
            go_on(sequence, result.token_id)
        if result.complete:
            break
    assert text_of(list(sequence.history)[3:]) == "ab"
    assert [result.complete for result in made] == [False] * (len(made) - 1) + [True]
    (replayed,) = sample(Sampler(), rows(1), guided(regex("ab"), encode("ab")))
    assert (replayed.token_id, replayed.complete) == (None, True)


def test_one_that_has_ended_takes_nobody_with_it() -> None:
    ended, wrong = guided(regex("ab"), encode("ab"), key="ended"), guided(regex("ab"), encode("x"), key="wrong")
    going, plain = guided(regex("ab"), key="going"), decoding(SamplingParams(temperature=0.0))
    logits = rows(4)
    made = sample(Sampler(), logits, ended, going, wrong, plain)
    assert made[0].complete
    assert made[0].token_id is None
    assert made[1].token_id in allowed(going)
    assert made[2].error
    assert made[2].token_id is None
    assert made[3].token_id == int(logits[3].argmax())


def test_logprobs_are_the_models_own() -> None:
    sequence = guided(regex("[0-9]+"), temperature=0.0, logprobs=2)
    logits = rows(1)
    (made,) = sample(Sampler(), logits, sequence)
    own = logits[0].log_softmax(-1)
    assert made.logprobs is not None
    assert made.logprobs.logprob == pytest.approx(float(own[made.token_id or 0]), abs=1e-5)
    assert made.logprobs.rank > 1
    assert made.logprobs.top[0][0] == int(own.argmax())


@pytest.mark.parametrize("seed", range(3))
def test_an_output_cut_anywhere_goes_on_with_the_same_tokens(seed: int) -> None:
    """As after a preemption, or on another rank: a new sampler that knows the history alone."""
    grammar = compiled(regex(r"([a-z]{1,6} ){2,5}[0-9]{1,3}(!|:)"))

    def rest(output: list[int], sampler: Sampler) -> list[int]:
        sequence = guided(grammar, output, seed=seed)
        while True:
            (made,) = sample(sampler, rows(1, 1000 * seed + sequence.position), sequence)
            if made.token_id is not None:
                go_on(sequence, made.token_id)
            if made.complete or made.token_id == EOS:
                return list(sequence.history)[3:]

    whole = rest([], Sampler())
    assert len(whole) > 5
    for cut in range(len(whole) + 1):
        assert rest(whole[:cut], Sampler()) == whole


def test_branches_go_their_own_ways_in_whatever_company() -> None:
    """Several at once, each in some of the steps only: as if each had been alone."""
    draw = random.Random(5)
    grammar = compiled(regex(r"([a-z]{1,6} ){3,5}!"))
    branches = [guided(grammar, key=str(seed), seed=seed) for seed in range(5)]
    together = Sampler()
    ended: set[str] = set()
    while len(ended) < len(branches):
        some = [one for one in branches if one.key not in ended and draw.random() < 0.7]
        if not some:
            continue
        logits = [rows(1, 100 * int(one.key) + one.position) for one in some]
        for one, made in zip(some, sample(together, torch.cat(logits), *some), strict=True):
            if made.token_id is not None:
                go_on(one, made.token_id)
            if made.complete or made.token_id == EOS:
                ended.add(one.key)
    for one in branches:
        alone = guided(grammar, key=one.key, seed=int(one.key))
        while list(alone.history) != list(one.history):
            (made,) = sample(Sampler(), rows(1, 100 * int(one.key) + alone.position), alone)
            assert made.token_id is not None
            go_on(alone, made.token_id)
            assert list(alone.history) == list(one.history)[: len(alone.history)]
