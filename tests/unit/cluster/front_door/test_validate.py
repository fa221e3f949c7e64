"""Bad input: each has its field and its words, and never gets near an engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.front_door.call import Call, Message, SamplingOptions
from cluster.front_door.errors import InvalidRequest, ModelNotFound
from cluster.front_door.limits import Limits
from cluster.front_door.model_card import ModelCard
from cluster.front_door.validate import Prepared, choice_seed, fit, resolve
from tests.fakes import CARD

LIMITS = Limits()


def _prepare(call: Call, prompt: list[int] | None = None, card: ModelCard = CARD) -> Prepared:
    return fit(resolve(call, card, LIMITS), [1, 2, 3] if prompt is None else prompt, card, field="text")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 1e-50}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 510}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x" * 257,)}, "stop"),
        ({"stop": tuple("abcdefghijklmnopq")}, "stop"),
        ({"stop_token_ids": (260,)}, "stop_token_ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop_token_ids": tuple([1] * 129)}, "stop_token_ids"),
        ({"logit_bias": {260: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias[1]"),
        ({"logit_bias": {1: math.nan}}, "logit_bias[1]"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias"),
    ],
)
def test_sampling_values_out_of_range(options: dict[str, object], field: str) -> None:
    call = Call(text="hi", sampling=SamplingOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        _prepare(call)
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (Call(), "prompt"),
        (Call(text="hi", token_ids=(1,)), "prompt"),
        (Call(token_ids=(1, 260)), "token_ids"),
        (Call(token_ids=(-1,)), "token_ids"),
        (Call(messages=()), "messages"),
        (Call(text="\ud800"), "text"),
        (Call(messages=(Message("user", "\udfff"),)), "messages"),
        (Call(text="hi", request_id="x" * 129), "request_id"),
        (Call(text="hi", request_id="a\nb"), "request_id"),
        (Call(text="hi", priority=2**40), "priority"),
        (Call(text="x" * 8_000_001), "text"),
    ],
)
def test_calls_out_of_form(call: Call, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _prepare(call)
    assert caught.value.field == field


def test_an_unknown_model_names_the_served_one() -> None:
    with pytest.raises(ModelNotFound, match="'gpt-9' is not served here; 'fake' is"):
        resolve(Call(model="gpt-9", text="hi"), CARD, LIMITS)


@pytest.mark.parametrize("name", ["", "fake", "fake-1b"])
def test_a_model_answers_to_its_names(name: str) -> None:
    resolve(Call(model=name, text="hi"), CARD, LIMITS)


def test_prompt_lengths() -> None:
    with pytest.raises(InvalidRequest, match="text is empty"):
        _prepare(Call(text=""), [])
    with pytest.raises(InvalidRequest, match="text has 512 tokens; the model's length is 512"):
        _prepare(Call(text="x"), [1] * 512)
    assert _prepare(Call(text="x"), [1] * 511).sampling.max_tokens == 1


def test_max_tokens_beyond_the_room_says_how_much_there_is() -> None:
    call = Call(text="x", sampling=SamplingOptions(max_tokens=510))
    with pytest.raises(InvalidRequest, match="max_tokens is 510, but a prompt of 3 tokens leaves room for 509"):
        _prepare(call)


def test_max_tokens_default_to_what_fits() -> None:
    assert _prepare(Call(text="x")).sampling.max_tokens == 509
    card = replace(CARD, defaults=SamplingOptions(max_tokens=100))
    assert _prepare(Call(text="x"), card=card).sampling.max_tokens == 100
    assert _prepare(Call(text="x"), [1] * 500, card=card).sampling.max_tokens == 12


def test_defaults_fill_what_the_client_left_unset() -> None:
    card = replace(CARD, defaults=SamplingOptions(temperature=0.6, top_k=40, stop=("END",)))
    prepared = _prepare(Call(text="x", sampling=SamplingOptions(temperature=0.0)), card=card)
    assert (prepared.sampling.temperature, prepared.sampling.top_k, prepared.stop) == (0.0, 40, ("END",))
    assert _prepare(Call(text="x"), card=card).sampling.temperature == 0.6


def test_top_k_off_and_huge() -> None:
    for given, resolved in ((-1, 0), (0, 0), (7, 7), (2**31 - 1, CARD.vocab_size), (10**30, CARD.vocab_size)):
        assert _prepare(Call(text="x", sampling=SamplingOptions(top_k=given))).sampling.top_k == resolved


def test_seeds_of_choices_differ_and_are_stable() -> None:
    seeds = [choice_seed(7, index) for index in range(16)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 16
    assert seeds[1] == choice_seed(7, 1) == 2174948161648732372
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_without_a_seed_two_calls_differ() -> None:
    assert _prepare(Call(text="x")).sampling.seed != _prepare(Call(text="x")).sampling.seed
