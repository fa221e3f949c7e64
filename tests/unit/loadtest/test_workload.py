"""Workloads: seeded, in range, within the model's length."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean, median

import pytest

from loadtest.workload import (
    FixedLengths,
    LengthModel,
    LogNormalLengths,
    MixtureLengths,
    TextPrompts,
    TokenPrompts,
    UniformLengths,
    Workload,
    parse_lengths,
    sharegpt_like,
)


def _draws(model: LengthModel, count: int = 4000) -> list[tuple[int, int]]:
    rng = random.Random(7)
    return [model.draw(rng) for _ in range(count)]


def test_fixed_lengths_are_fixed() -> None:
    assert set(_draws(FixedLengths(3, 9))) == {(3, 9)}


def test_uniform_lengths_reach_both_ends_and_no_further() -> None:
    prompts, outputs = zip(*_draws(UniformLengths((2, 5), (7, 8))), strict=True)
    assert set(prompts) == {2, 3, 4, 5}
    assert set(outputs) == {7, 8}


def test_lognormal_lengths_have_the_median_and_a_tail() -> None:
    prompts, outputs = zip(*_draws(LogNormalLengths((100, 1.0), (1, 0.0))), strict=True)
    assert median(prompts) == pytest.approx(100, rel=0.1)
    assert mean(prompts) == pytest.approx(100 * 2.718**0.5, rel=0.15)
    assert set(outputs) == {1}
    assert min(prompts) >= 1


def test_a_mixture_draws_by_weight() -> None:
    mixture = MixtureLengths(((3.0, FixedLengths(1, 1)), (1.0, FixedLengths(2, 2))))
    assert mean(prompt for prompt, _ in _draws(mixture)) == pytest.approx(1.25, abs=0.05)


def test_chat_shaped_lengths_are_mostly_short_with_a_long_tail() -> None:
    prompts = sorted(prompt for prompt, _ in _draws(sharegpt_like()))
    assert prompts[len(prompts) // 2] < 100
    assert prompts[len(prompts) * 98 // 100] > 800


def test_the_same_seed_gives_the_same_requests() -> None:
    workload = Workload(lengths=sharegpt_like(), prompts=TokenPrompts(1000), seed=3, max_model_len=64)
    first, again = (list(islice(workload.requests(), 20)) for _ in range(2))
    assert first == again
    other = Workload(lengths=sharegpt_like(), prompts=TokenPrompts(1000), seed=4, max_model_len=64)
    assert list(islice(other.requests(), 20)) != first


def test_two_doors_are_asked_as_much_and_share_no_prefix() -> None:
    workload = Workload(lengths=sharegpt_like(), prompts=TokenPrompts(100_000))
    first, second = (list(islice(replace(workload, asked=door).requests(), 50)) for door in ("grpc", "http"))
    sizes = [[(work.num_prompt_tokens, work.num_output_tokens) for work in asked] for asked in (first, second)]
    assert sizes[0] == sizes[1]
    assert not {work.prompt[0] for work in first} & {work.prompt[0] for work in second}


def test_requests_fit_the_model() -> None:
    workload = Workload(lengths=LogNormalLengths((60, 2), (30, 2)), prompts=TokenPrompts(100), max_model_len=64)
    for work in islice(workload.requests(), 500):
        assert work.num_prompt_tokens >= 1
        assert work.num_prompt_tokens + work.num_output_tokens <= 64


def test_token_prompts_keep_off_the_ends_of_the_vocabulary() -> None:
    ids = TokenPrompts(100).make(random.Random(0), 2000)
    assert len(ids) == 2000
    assert (min(ids), max(ids)) == (10, 89)


def test_text_prompts_come_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  \ntwo\n")
    prompts = TextPrompts.from_file(file)
    assert prompts.lines == ("one", "two")
    assert {prompts.make(random.Random(seed), 99) for seed in range(20)} == {"one", "two"}


def test_lengths_are_read_from_text() -> None:
    assert parse_lengths("fixed:16:128") == FixedLengths(16, 128)
    assert parse_lengths("uniform:1-4:5-6") == UniformLengths((1, 4), (5, 6))
    assert parse_lengths("lognormal:100~0.5:20~1") == LogNormalLengths((100, 0.5), (20, 1))
    assert parse_lengths("sharegpt") == sharegpt_like()


@pytest.mark.parametrize(
    "text", ["", "fixed", "fixed:1", "fixed:0:1", "fixed:a:b", "uniform:4-1:1-1", "uniform:1:2", "lognormal:0~1:1~1"]
)
def test_bad_lengths_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^lengths"):
        parse_lengths(text)
