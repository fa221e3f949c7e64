"""What the ranks of a pipeline's stages carry, as the leader tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.engine.experts import ExpertWatch
from cluster.engine.ranks import ExpertPlaces
from cluster.engine.states import EngineState
from scheduler.experts import contiguous
from tests.unit.cluster.engine.fake_ranks import FakeRank
from tests.unit.cluster.engine.test_leader import SETTINGS, leading
from workers.parallel.plan import ParallelPlan
from workers.report import ExpertLoads
from workers.settings import ExpertBalance


def loads(layers: tuple[int, ...], *counts: tuple[int, ...]) -> ExpertLoads:
    return ExpertLoads(epoch=0, layers=layers, counts=counts, slots=(contiguous(4, 2).slots,) * len(layers))


def test_stages_count_for_themselves() -> None:
    watch = ExpertWatch()
    assert watch.stage_tokens == []
    first, last = loads((1,), (4, 0, 0, 0)), loads((2, 3), (1, 1, 1, 1), (0, 1, 2, 3))
    for number in (1, 2):
        doubled = replace(last, counts=tuple(tuple(number * n for n in layer) for layer in last.counts))
        watch.see([[first, first], [doubled, doubled], []])
    assert watch.stage_tokens[0] == pytest.approx([8 * 0.9, 0.0]), "two groups, and a look that brought nothing new"
    fade = 0.9 + 1.0
    assert watch.stage_tokens[1] == pytest.approx([2 * fade * (2 + 1), 2 * fade * (2 + 5)])
    assert watch.stage_tokens[2] == []
    even, uneven, one_sided = 2 * fade * 4, 2 * fade * 5 * 2, 8 * 0.9 * 2
    assert watch.imbalance == pytest.approx((even + uneven + one_sided) / (2 * fade * (4 + 6) + 8 * 0.9))


PIPELINE = replace(SETTINGS, plan=ParallelPlan(data=2, pipeline=2, tensor=2))


def with_experts(index: int, ranks: list[FakeRank]) -> None:
    """Layer 1 on the first stages' ranks, layer 2 on the last ones'."""
    del index
    slots = (contiguous(8, 4).slots,)
    for rank in ranks:
        stage = rank.rank // 2 % 2
        rank.loads = ExpertLoads(epoch=0, layers=(1 + stage,), counts=((9, 9, 3, 3, 1, 1, 1, 1),), slots=slots)


async def test_every_rank_of_a_pipeline_is_told() -> None:
    """Two groups of two stages of two; experts of a stage live on its four ranks."""
    async with leading(with_experts, settings=PIPELINE) as case:
        await case.until_state(EngineState.READY)
        await case.until(lambda: case.leader.status().expert_imbalance > 0)
        told = [rank.expert_tokens for rank in case.leader.status().ranks]
        ratios = [tokens / told[4] for tokens in told]
        assert [round(ratio) for ratio in ratios] == [9, 3, 9, 3, 1, 1, 1, 1]
        asked = [rank.rank for rank in case.ranks.sets[0] if "expert_loads" in rank.calls]
        assert asked == [0, 2, 4, 6], "each stage's first rank sees all of its group's tokens"


async def test_each_stage_moves_its_own_experts() -> None:
    """One layer an epoch: the ranks of the other stage read nothing and go along."""
    told: list[tuple[int, int, list[int]]] = []

    class Staging(FakeRank):
        async def stage_experts(self, epoch: int, placements: Sequence[ExpertPlaces]) -> None:
            await super().stage_experts(epoch, placements)
            told.append((epoch, self.rank // 2 % 2, [layer for layer, _ in placements]))

    def staging(index: int, ranks: list[FakeRank]) -> None:
        with_experts(index, ranks)
        for rank in ranks:
            rank.__class__ = Staging

    settings = replace(PIPELINE, expert_balance=ExpertBalance(interval_s=0.01, threshold=1.5))
    async with leading(staging, settings=settings) as case:
        await case.until_state(EngineState.READY)
        await case.until(lambda: case.leader.status().expert_epoch == 2)
        ranks = case.ranks.sets[0]
        await case.until(lambda: 0 < case.leader.status().expert_imbalance < 1.5)
        assert sorted(told) == sorted(
            (epoch, stage, [epoch] if epoch == 1 + stage else [])
            for epoch in (1, 2)
            for stage in (0, 1)
            for _ in range(4)
        )
        for rank in ranks:
            assert rank.loads is not None
            assert all(len({0, 1} & set(held)) <= 1 for held in rank.loads.slots[0]), "the two busy ones part"
        assert case.leader.state is EngineState.READY
