"""The overlapped loop against the plain one, with a real model: every sequence gets the same tokens."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from scheduler.batcher import Batcher, BatcherSettings
from scheduler.plan import StepPlan
from scheduler.request import Request, SamplingParams
from tests.checkpoints import tiny_llama
from tests.unit.workers.rank.outlets import Recorder
from tests.unit.workers.ranks import settings_for
from workers.assemble import assemble
from workers.execution import FirstRank
from workers.loop import StepLoop
from workers.parallel.collectives import SingleRank

NUM_BLOCKS = 48  # of four tokens: not all sequences find room at once, so some are preempted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def requests() -> list[Request]:
    """Greedy and sampled, with penalties, stop tokens, logprobs and common prefixes."""
    rng = random.Random(3)
    shared = tuple(rng.randrange(3, 300) for _ in range(12))
    made = []
    for index in range(24):
        own = tuple(rng.randrange(3, 300) for _ in range(rng.randint(1, 30)))
        made.append(
            Request(
                key=str(index),
                prompt_token_ids=shared + own if index % 3 else own,
                sampling=SamplingParams(
                    temperature=0.0 if index % 2 else 1.0,
                    seed=index,
                    max_tokens=rng.randint(1, 30),
                    min_tokens=index % 2,
                    repetition_penalty=1.2 if index % 4 == 0 else 1.0,
                    logprobs=2 if index % 5 == 0 else None,
                    prompt_logprobs=0 if index % 7 == 0 else None,
                ),
                arrival_s=float(index),
                eos_token_ids=frozenset(range(40)),
            )
        )
    return made


def answers(model: Path, *, overlap: bool) -> tuple[dict[str, object], list[StepPlan]]:
    settings = settings_for(model, max_batch_size=6, max_batch_tokens=24, cache_bytes=1 << 20)
    runner = assemble(settings, settings.plan.place(0), SingleRank())
    assert runner.num_blocks >= NUM_BLOCKS
    limits = BatcherSettings(
        max_batch_size=6, max_batch_tokens=24, max_model_len=128, block_size=4, num_blocks=NUM_BLOCKS, max_waiting=64
    )
    batcher = Batcher(limits, clock=time.monotonic)
    plans: list[StepPlan] = []
    outlet = Recorder()
    loop = StepLoop(
        batcher,
        FirstRank(runner, None).run,
        rank=0,
        clock=time.monotonic,
        overlap=overlap,
        on_step=lambda plan, seconds: plans.append(plan),
    )
    asked = requests()
    for request in asked:
        loop.submit(request, outlet)
    loop.start()
    outlet.wait(lambda: all(outlet.finished(request.key) for request in asked))
    loop.stop(10)
    batcher.check_integrity()
    assert batcher.load().num_free_blocks == NUM_BLOCKS
    return {
        request.key: [
            (event.position, event.token_id, event.finish, event.stop_token_id) for event in outlet.of(request.key)
        ]
        for request in asked
    }, plans


def test_both_loops_give_the_same_answers(model: Path) -> None:
    plain, plain_plans = answers(model, overlap=False)
    overlapped, plans = answers(model, overlap=True)
    assert overlapped == plain
    # Ahead of an end, a sequence is in one step more than it needs: what that made was dropped.
    assert sum(len(plan.sequences) for plan in plans) > sum(len(plan.sequences) for plan in plain_plans)
    assert [plan.step for plan in plans] == list(range(1, len(plans) + 1))
