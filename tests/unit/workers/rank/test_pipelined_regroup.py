"""A pipeline's real ends, whose connections break at any moment: steps that were under way are begun again, and every
output is the undisturbed one."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

import pytest

from scheduler.batcher import Batcher
from scheduler.plan import FinishReason
from scheduler.request import Request
from tests.unit.scheduler.harness import request, settings
from tests.unit.workers.rank.outlets import Recorder
from tests.unit.workers.stage_threads import StageThreads
from workers.pipelined_loop import PipelinedLoop

VOCAB_SIZE = 41
NUM_STAGES = 3


class Group:
    """A loop over stages in threads, and what a leader does when they are interrupted."""

    def __init__(self) -> None:
        limits = settings(num_blocks=40, max_batch_tokens=16)
        self.stages = StageThreads(NUM_STAGES, block_size=limits.block_size, vocab_size=VOCAB_SIZE)
        self.batcher = Batcher(limits, clock=time.monotonic, generation=1, num_flights=NUM_STAGES)
        self._interrupted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.loop = PipelinedLoop(
            self.batcher, self.stages.first, rank=0, clock=time.monotonic, on_interrupted=self._on_interrupted
        )
        self.generation = 1
        self.outlet = Recorder()
        self.loop.attach(self.outlet)
        self._leader = threading.Thread(target=self._lead)
        self._leader.start()
        self.stages.start(self.loop.wake, self.loop.interrupt)
        self.loop.start()

    def outputs(self, requests: list[Request]) -> dict[str, list[int | None]]:
        for one in requests:
            self.loop.submit(one, self.outlet)
        self.outlet.wait(lambda: all(self.outlet.finished(one.key) for one in requests))
        assert {event.finish for event in self.outlet.events} == {None, FinishReason.LENGTH}
        return {one.key: [event.token_id for event in self.outlet.of(one.key)] for one in requests}

    def close(self) -> None:
        self._interrupted.put(None)
        self._leader.join()
        self.loop.stop(10)
        self.stages.close()
        self.batcher.check_integrity()
        assert self.batcher.load().num_free_blocks == self.batcher.settings.num_blocks

    def _on_interrupted(self, reason: str) -> None:
        self.stages.hang_up()
        self._interrupted.put(reason)

    def _lead(self) -> None:
        while self._interrupted.get() is not None:
            assert self.loop.rest(10)
            self.generation += 1
            self.stages.regroup(self.generation)
            self.loop.resume(self.generation)
            self.stages.start(self.loop.wake, self.loop.interrupt)


def _requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        request(
            str(number),
            [number, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30)))],
            max_tokens=rng.randint(4, 20),
            temperature=rng.choice([0.0, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=number,
            ignore_eos=True,
        )
        for number in range(16)
    ]


class Breaking:
    """Ranks go while the first stage, which is this one's, runs or has run certain steps."""

    def __init__(self, group: Group, rng: random.Random) -> None:
        self._group = group
        self._moments = sorted(rng.sample(range(3, 60), 5))
        self._ranks = [rng.randint(1, NUM_STAGES - 1) for _ in self._moments]
        self._forward: Callable[..., object] = group.stages.caches[0].forward
        self.num_steps = self.num_broken = 0

    def forward(self, inputs: object) -> object:
        self.num_steps += 1
        if self.num_broken < len(self._moments) and self.num_steps >= self._moments[self.num_broken]:
            self._group.stages.cut(self._ranks[self.num_broken])
            self.num_broken += 1
        return self._forward(inputs)


@pytest.mark.parametrize("seed", range(6))
def test_outputs_are_the_undisturbed_ones_whoever_goes(seed: int) -> None:
    undisturbed = Group()
    expected = undisturbed.outputs(_requests(seed))
    undisturbed.close()
    assert undisturbed.generation == 1
    group = Group()
    breaking = Breaking(group, random.Random(seed))
    group.stages.caches[0].forward = breaking.forward  # type: ignore[method-assign, assignment]
    assert group.outputs(_requests(seed)) == expected
    group.close()
    assert breaking.num_broken == 5
    assert group.generation >= 5, "each was noticed, if not after the last step"
