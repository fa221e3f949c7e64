"""Deterministic models: a position's logits have the same bits however its step was made up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.unit.workers.deterministic.models import MODELS, make_model
from tests.unit.workers.ranks import Ranks, Sequence_, settings_for, step_of
from tests.unit.workers.thread_exchange import Table, ThreadExchange, on_threads
from workers.assemble import assemble
from workers.parallel.collectives import SingleRank
from workers.parallel.plan import ParallelPlan
from workers.runner import Runner

BLOCK_SIZE = 4
MOST_STEPS = 120
LENGTHS = (147, 70, 1, 33, 16, 66, 131)
SETTINGS = {"deterministic": True, "max_model_len": 160, "block_size": BLOCK_SIZE, "cache_bytes": 1 << 23}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in MODELS}


CASES = (*itertools.product(MODELS, ("bfloat16", "float32"), ("none",)), ("deepseek", "bfloat16", "int8"))


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def ranks(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Ranks]:
    name, dtype, quantization = request.param
    ranks = Ranks(folders[name], dtype=dtype, quantization=quantization, **SETTINGS)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def expected(ranks: Ranks) -> list[torch.Tensor]:
    """Every sequence alone, in one step."""
    found = []
    for sequence in _sequences(seed=0):
        _step(ranks.runners[0], [(sequence, len(sequence.token_ids))])
        found.append(torch.cat(sequence.logits))
    return found


def _sequences(seed: int) -> list[Sequence_]:
    """The same tokens at every call, in blocks that `seed` shuffles."""
    tokens, blocks = random.Random(1), list(range(sum(-(-length // BLOCK_SIZE) for length in LENGTHS)))
    random.Random(seed).shuffle(blocks)
    return [
        Sequence_([tokens.randrange(203) for _ in range(n)], [blocks.pop() for _ in range(-(-n // BLOCK_SIZE))])
        for n in LENGTHS
    ]


def _step(runner: Runner, parts: Sequence[tuple[Sequence_, int]]) -> None:
    logits = runner.forward(step_of([(sequence, count, count) for sequence, count in parts]))
    assert logits is not None
    for (sequence, count), rows in zip(parts, torch.split(logits, [count for _, count in parts]), strict=True):
        sequence.logits.append(rows)
        sequence.num_computed += count


def _ragged_step(sequences: Sequence[Sequence_], rng: random.Random) -> list[tuple[Sequence_, int]]:
    """Some tokens of some of the sequences that have any left."""
    left = [s for s in sequences if s.num_computed < len(s.token_ids)]
    chosen = rng.sample(left, rng.randint(1, len(left)))
    return [(s, min(rng.choice((1, 1, 1, 1, 2, 15, 40)), len(s.token_ids) - s.num_computed)) for s in chosen]


def _unfinished(sequences: Sequence[Sequence_]) -> bool:
    return any(s.num_computed < len(s.token_ids) for s in sequences)


def _check(sequences: Sequence[Sequence_], expected: Sequence[torch.Tensor]) -> None:
    for sequence, logits in zip(sequences, expected, strict=True):
        assert torch.equal(torch.cat(sequence.logits), logits)


def test_alone_in_chunks_of_any_size(ranks: Ranks, expected: list[torch.Tensor]) -> None:
    rng = random.Random(2)
    sequences = _sequences(seed=3)
    for sequence in sequences:
        while left := len(sequence.token_ids) - sequence.num_computed:
            _step(ranks.runners[0], [(sequence, min(left, rng.randint(1, 50)))])
    _check(sequences, expected)


def test_alone_token_by_token(ranks: Ranks, expected: list[torch.Tensor]) -> None:
    sequences = _sequences(seed=4)
    for sequence in sequences[:2]:
        for _ in sequence.token_ids:
            _step(ranks.runners[0], [(sequence, 1)])
    _check(sequences[:2], expected[:2])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_in_any_batch(ranks: Ranks, expected: list[torch.Tensor], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng, sequences = random.Random(threads), _sequences(seed=threads)
        while _unfinished(sequences):
            _step(ranks.runners[0], _ragged_step(sequences, rng))
    finally:
        torch.set_num_threads(before)
    _check(sequences, expected)


def test_a_preempted_sequence_is_computed_again(ranks: Ranks, expected: list[torch.Tensor]) -> None:
    first, second, *_ = _sequences(seed=5)
    for _ in range(30):
        _step(ranks.runners[0], [(first, 1), (second, 2)])
    first.block_ids.reverse()
    first.num_computed, first.logits = 0, []
    _step(ranks.runners[0], [(first, 31), (second, 1)])
    _step(ranks.runners[0], [(first, len(first.token_ids) - 31)])
    assert torch.equal(torch.cat(first.logits), expected[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("size", "redundant"), [(2, 0), (2, 4), (4, 2)])
def test_experts_on_any_number_of_ranks(folders: dict[str, Path], dtype: str, size: int, redundant: int) -> None:
    """Each group has its own batches, and serves the others' experts when its sequences have ended."""
    single = assemble(settings_for(folders["deepseek"], dtype=dtype, **SETTINGS), ParallelPlan().place(0), SingleRank())
    alone = _sequences(seed=0)
    for sequence in alone:
        _step(single, [(sequence, len(sequence.token_ids))])
    plan = ParallelPlan(data=size, redundant_experts=redundant)
    settings = settings_for(folders["deepseek"], dtype=dtype, plan=plan, **SETTINGS)
    table = Table(size)
    groups: list[list[Sequence_]] = [_sequences(seed=9)[rank::size] for rank in range(size)]

    def work(rank: int) -> None:
        # Every rank knows how many steps the longest takes: in an engine they ask each other.
        runner = assemble(settings, plan.place(rank), SingleRank(), expert=ThreadExchange(table, rank))
        rng, steps = random.Random(rank), 0
        while _unfinished(groups[rank]):
            _step(runner, _ragged_step(groups[rank], rng))
            steps += 1
        for _ in range(MOST_STEPS - steps):
            runner.keep_step()

    on_threads(size, work)
    for rank, sequences in enumerate(groups):
        _check(sequences, [torch.cat(sequence.logits) for sequence in alone[rank::size]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_the_fast_mode_repeats_itself(folders: dict[str, Path], name: str, dtype: str) -> None:
    """The same steps give the same bits, in any blocks."""
    found = []
    for seed in range(2):
        settings = settings_for(folders[name], dtype=dtype, **(SETTINGS | {"deterministic": False}))
        runner = assemble(settings, ParallelPlan().place(0), SingleRank())
        rng, sequences = random.Random(6), _sequences(seed)
        while _unfinished(sequences):
            _step(runner, _ragged_step(sequences, rng))
        found.append(sequences)
    _check(found[0], [torch.cat(sequence.logits) for sequence in found[1]])


def test_more_than_two_tensor_ranks_are_refused(folders: dict[str, Path]) -> None:
    plan = ParallelPlan(tensor=3)
    settings = settings_for(folders["llama"], plan=plan, **SETTINGS)
    with pytest.raises(ValueError, match=r"inference\.deterministic takes parallel\.tensor 1 or 2, not 3"):
        assemble(settings, plan.place(0), SingleRank())
