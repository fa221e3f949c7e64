"""The compiled gate and moves of rows against the plain ones."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.build import build
from workers.kernels.native import NativeKernels, find_native
from workers.model.gate import choose_experts
from workers.model.moe_config import GateRule
from workers.parallel.moves import TorchMoves

STEP = 1 / 128  # between neighbouring bf16 values, relative to them, at most
TORCH = TorchMoves()
RULES = [
    GateRule(num_experts=32, top_k=4, sigmoid=True, num_groups=4, groups_kept=2, normalize=True, scale=2.5),
    GateRule(num_experts=256, top_k=8, sigmoid=True, num_groups=8, groups_kept=4, normalize=True, scale=2.5),
    GateRule(num_experts=384, top_k=8, sigmoid=True, normalize=False),
    GateRule(num_experts=64, top_k=6, sigmoid=False),
    GateRule(num_experts=20, top_k=6, sigmoid=False, num_groups=5, groups_kept=3, scale=16.0),
    GateRule(num_experts=4, top_k=1, sigmoid=False, num_groups=4, groups_kept=1, normalize=True),
]


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    build()
    library = find_native()
    assert library is not None
    return NativeKernels(library)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 700])
def test_the_same_experts_for_every_token(native: NativeKernels, rule: GateRule, biased: bool, num_tokens: int) -> None:
    logits = torch.randn(num_tokens, rule.num_experts, generator=_generator(num_tokens)) * 3
    # Makes a chosen score negative here and there, where masking with zero would be wrong.
    bias = torch.randn(rule.num_experts, generator=_generator(1)) * 0.7 - 0.5 if biased else None
    ours, expected = native.choose_experts(logits, rule, bias), choose_experts(logits, rule, bias)
    assert torch.equal(ours.expert_ids, expected.expert_ids)
    torch.testing.assert_close(ours.weights, expected.weights)


def test_of_equals_the_first_are_chosen(native: NativeKernels) -> None:
    ours = native.choose_experts(torch.zeros(2, 64), RULES[3])
    assert ours.expert_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_broken_logits_still_choose_different_experts(native: NativeKernels, rule: GateRule) -> None:
    ids = native.choose_experts(torch.full((3, rule.num_experts), torch.nan), rule).expert_ids
    for row in ids.tolist():
        assert sorted(set(row)) == row
        assert 0 <= row[0] <= row[-1] < rule.num_experts


@pytest.mark.parametrize(("count", "slots"), [(0, 3), (1, 1), (64, 32), (5000, 300)])
def test_order(native: NativeKernels, count: int, slots: int) -> None:
    found = torch.randint(slots, (count,), generator=_generator(count))
    for ours, expected in zip(native.moves.group(found, slots), TORCH.group(found, slots), strict=True):
        assert torch.equal(ours, expected)
    arrived = torch.randint(4, (3, slots), generator=_generator(count))
    for ours, expected in zip(native.moves.merge(arrived), TORCH.merge(arrived), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(0, 3, 8), (1, 4, 64), (700, 4, 96)])
def test_rows_there_and_back(
    native: NativeKernels, num_tokens: int, top_k: int, width: int, dtype: torch.dtype
) -> None:
    generator = _generator(num_tokens)
    x = torch.randn(num_tokens, width + 8, generator=generator).to(dtype)[:, :width]
    order = torch.randperm(num_tokens * top_k, generator=generator)
    rows = native.moves.take(x, order, top_k)
    assert torch.equal(rows, TORCH.take(x, order, top_k))
    assert torch.equal(native.moves.put(rows, order), TORCH.put(rows, order))
    weights = torch.rand(num_tokens, top_k, generator=generator)
    kept = len(order) - len(order) // 3  # the other choices are other ranks'
    ours = native.moves.weighted_sum(rows[:kept], order[:kept], weights)
    expected = TORCH.weighted_sum(rows[:kept].float(), order[:kept], weights)
    assert ours.dtype == dtype
    error = (ours.float() - expected).abs()
    assert bool((error <= STEP * expected.abs()).all())


@pytest.mark.parametrize("slots", [0, 5, 3])
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_rows_are_spread_alike(native: NativeKernels, tokens: int, slots: int) -> None:
    places, generator = 15, _generator(tokens)
    wide = torch.randn(tokens, 48, generator=generator).bfloat16()
    chosen = torch.randint(0, places, (tokens, 4), generator=generator)
    for x in (wide, wide[:, 8:40], wide.t().contiguous().t()):
        ours, expected = (moves.spread(x, chosen, places, slots) for moves in (native.moves, TORCH))
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
        assert len(ours[0]) == tokens * (4 + (places // slots if slots else 0))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_surveys_are_alike(native: NativeKernels, ranks: int) -> None:
    told = torch.randint(0, 3, (ranks, ranks, 4), generator=_generator(ranks))
    for index in range(ranks):
        assert native.moves.survey(told, index) == TORCH.survey(told, index)


@pytest.mark.parametrize("plain", [1, 3])
def test_plain_choices_have_a_weight_of_one(native: NativeKernels, plain: int) -> None:
    tokens, top_k, width = 7, 3, 64
    rows = torch.randn(tokens * (top_k + plain), width, generator=_generator(2)).bfloat16()
    order = torch.randperm(len(rows), generator=_generator(3))
    weights = torch.rand(tokens, top_k, generator=_generator(4))
    ones = torch.cat((weights, torch.ones(tokens, plain)), 1)
    for moves in (native.moves, TORCH):
        found = moves.weighted_sum(rows, order, weights, plain)
        assert torch.equal(found, moves.weighted_sum(rows, order, ones))
