"""Prompt logprobs come once, whole and in order, however the prompt was cut."""

from __future__ import annotations

import pytest

from scheduler.draft import Draft
from scheduler.plan import FinishReason
from scheduler.sequence import Sequence
from tests.unit.scheduler.harness import Bench, request, settings


def delivered(bench: Bench, key: str) -> list[tuple[int, list[float]]]:
    """Where prompt logprobs came, and of which prompt tokens (the fake runner's logprob names the index)."""
    return [
        (event.position, [-entry.logprob for entry in event.prompt_logprobs])
        for event in bench.events[key]
        if event.prompt_logprobs
    ]


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("max_prompt_logits", [1, 4, 64])
def test_chunks_do_not_show(max_batch_tokens: int, max_prompt_logits: int) -> None:
    bench = Bench(settings(max_batch_tokens=max_batch_tokens, max_prompt_logits=max_prompt_logits))
    bench.submit(request("a", 9, prompt_logprobs=1, max_tokens=3), request("b", 4, max_tokens=3))
    bench.submit(request("c", 5, prompt_logprobs=0, max_tokens=3))
    bench.drain()
    assert delivered(bench, "a") == [(0, [1, 2, 3, 4, 5, 6, 7, 8])]
    assert delivered(bench, "b") == []
    assert delivered(bench, "c") == [(0, [1, 2, 3, 4])]
    bench.check_end()


def test_rows_of_logits_are_bounded() -> None:
    bench = Bench(settings(max_prompt_logits=6))
    bench.submit(request("a", 10, prompt_logprobs=0), request("b", 10, prompt_logprobs=0), request("c", 10))
    while bench.batcher.has_work:
        plan = bench.step()
        rows = [one.num_logits for one in plan.sequences if one.sampling.prompt_logprobs is not None]
        assert sum(rows) <= 6 + len(rows)
    bench.check_end()


def test_rows_that_were_delivered_before_a_preemption_are_free() -> None:
    sequence = Sequence.open(request("a", 16, prompt_logprobs=0), order=(0,), max_output_tokens=4)
    draft = Draft(num_tokens=64, num_prompt_logits=3)
    assert draft.room_for(sequence) == 3
    sequence.num_prompt_predicted = 5
    assert draft.room_for(sequence) == 8
    sequence.num_prompt_predicted = 15
    assert draft.room_for(sequence) == 16


def test_a_prompt_of_one_token_has_none() -> None:
    bench = Bench(settings())
    bench.submit(request("a", 1, prompt_logprobs=0, max_tokens=2))
    bench.drain()
    assert delivered(bench, "a") == []


def test_a_preempted_prefill_does_not_make_them_again() -> None:
    bench = Bench(settings(num_blocks=7, max_batch_tokens=2))
    bench.submit(request("a", 3, max_tokens=20))
    bench.step()
    bench.submit(request("b", 16, max_tokens=2, prompt_logprobs=0))
    rows = 0
    while bench.batcher.has_work:
        plan = bench.step()
        rows += sum(one.num_logits for one in plan.sequences if one.key == "b" and not one.samples)
        if bench.batcher.load().num_preemptions == 0:
            assert bench.output("b") == []
    assert bench.batcher.load().num_preemptions >= 1
    assert delivered(bench, "b") == [(0, [float(index) for index in range(1, 16)])]
    assert rows <= 15
    bench.check_end()


def test_a_replay_does_not_make_them_again() -> None:
    bench = Bench(settings())
    first = Bench(settings())
    first.submit(request("a", 6, prompt_logprobs=0, max_tokens=4))
    first.drain()
    bench.submit(
        request("a", 6, prompt_logprobs=0, max_tokens=4, output_token_ids=tuple(first.output("a")[:2])),
    )
    bench.drain()
    assert delivered(bench, "a") == []
    assert bench.output("a") == first.output("a")
    assert bench.finish("a") is FinishReason.LENGTH
