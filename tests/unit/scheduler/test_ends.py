"""How sequences end: stop tokens, lengths, refusals, cancels, deadlines, failure."""

from __future__ import annotations

import re
from typing import Any

import pytest

from scheduler.plan import FinishReason
from scheduler.request import Request
from tests.unit.scheduler.harness import Bench, expected_output, next_token, request, settings


def path(prompt: list[int], length: int) -> list[int]:
    """What the fake model says after `prompt` where nothing stops it."""
    output: list[int] = []
    while len(output) < length:
        output.append(next_token([*prompt, *output]))
    return output


PROMPT = [3, 1, 4]
PATH = path(PROMPT, 12)
STOP = next(token_id for token_id in PATH[2:] if token_id not in PATH[:2])
AT = PATH.index(STOP)


def run(one: Request, **limits: int) -> Bench:
    bench = Bench(settings(**limits))
    bench.submit(one)
    bench.drain()
    bench.check_end()
    return bench


def test_eos_is_emitted_and_ends_the_sequence() -> None:
    last = run(request("a", PROMPT, max_tokens=12, eos_token_ids=frozenset({STOP}))).events["a"][-1]
    assert (last.token_id, last.position, last.finish, last.stop_token_id) == (STOP, AT, FinishReason.STOP, STOP)


def test_ignored_eos_does_not() -> None:
    bench = run(request("a", PROMPT, max_tokens=12, ignore_eos=True, eos_token_ids=frozenset({STOP})))
    assert bench.output("a") == PATH
    assert bench.events["a"][-1].stop_token_id is None


def test_a_stop_token_ends_the_sequence_even_where_eos_is_ignored() -> None:
    bench = run(request("a", PROMPT, max_tokens=12, ignore_eos=True, stop_token_ids=frozenset({STOP})))
    assert bench.events["a"][-1].stop_token_id == STOP


def test_a_stop_token_at_the_last_position_is_a_stop() -> None:
    bench = run(request("a", PROMPT, max_tokens=AT + 1, eos_token_ids=frozenset({STOP})))
    assert bench.finish("a") is FinishReason.STOP


def test_no_stop_token_before_min_tokens() -> None:
    bench = run(request("a", PROMPT, max_tokens=12, min_tokens=AT + 1, eos_token_ids=frozenset({STOP})))
    assert len(bench.output("a")) > AT + 1
    assert STOP not in bench.output("a")[: AT + 1]


def test_max_tokens_is_clipped_by_the_model_s_length() -> None:
    bench = run(request("a", 10, max_tokens=1000), max_model_len=16)
    assert (len(bench.output("a")), bench.finish("a")) == (6, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "limits", "error"),
    [
        (0, {}, "the prompt is empty"),
        (16, {"max_model_len": 16}, "the prompt has 16 tokens; at most 15 leave room"),
        (13, {"num_blocks": 3}, r"has 13 tokens, and the whole KV cache holds 12 \(3 blocks of 4\)"),
    ],
)
def test_what_can_never_run_is_refused(num_prompt_tokens: int, limits: dict[str, int], error: str) -> None:
    bench = Bench(settings(**limits))
    bench.submit(request("a", num_prompt_tokens))
    assert not bench.batcher.has_work
    assert bench.finish("a") is FinishReason.REFUSED
    assert re.search(error, bench.events["a"][0].error)


def test_the_longest_prompt_that_fits_runs() -> None:
    assert run(request("a", 15, max_tokens=4), max_model_len=16).finish("a") is FinishReason.LENGTH
    assert run(request("a", 12, max_tokens=4), num_blocks=3).finish("a") is FinishReason.LENGTH


def test_a_full_queue_refuses() -> None:
    bench = Bench(settings(max_waiting=2))
    bench.submit(request("a"), request("b"), request("c"))
    refused = bench.events["c"][0]
    assert (refused.finish, refused.position) == (FinishReason.REFUSED, 0)
    assert refused.error.startswith("queue full: 2 requests are waiting")
    bench.step()
    bench.submit(request("d"))
    bench.drain()
    assert bench.finish("d") is FinishReason.LENGTH


def test_a_waiting_request_is_cancelled_at_once() -> None:
    bench = Bench(settings(max_batch_size=1))
    bench.submit(request("a"), request("b"))
    bench.step()
    assert bench.cancel("b")
    assert bench.finish("b") is FinishReason.CANCELLED
    assert not bench.cancel("b")
    assert not bench.cancel("never heard of")


def test_a_running_request_gives_its_blocks_back_at_once() -> None:
    bench = Bench(settings())
    bench.submit(request("a"))
    bench.step()
    assert bench.cancel("a")
    load = bench.batcher.load()
    assert (load.num_running, load.num_free_blocks) == (0, load.num_blocks)
    assert bench.events["a"][-1].position == 1


def test_a_request_in_flight_keeps_its_blocks_until_the_step_is_over() -> None:
    bench = Bench(settings())
    bench.submit(request("a"), request("b"))
    bench.schedule()
    held = bench.batcher.load().num_free_blocks
    assert bench.cancel("a")
    assert bench.finish("a") is FinishReason.CANCELLED
    assert bench.batcher.load().num_free_blocks == held
    assert [event.key for event in bench.commit()] == ["b"]
    assert bench.batcher.load().num_free_blocks == held + 2
    bench.drain()
    bench.check_end()


def test_a_key_may_come_again_while_its_old_step_is_in_flight() -> None:
    bench = Bench(settings())
    bench.submit(request("a", 3))
    bench.schedule()
    bench.cancel("a")
    bench.submit(request("a", 6, max_tokens=2))
    assert bench.commit() == []
    bench.drain()
    bench.check_end()


def test_an_expired_waiting_request_is_never_prefilled() -> None:
    bench = Bench(settings(max_batch_size=1))
    bench.submit(request("a", max_tokens=3), request("b", deadline_s=105.0))
    bench.step()
    bench.clock.now_s = 105.0
    assert bench.finish("b") is None
    bench.step()
    assert bench.finish("b") is FinishReason.DEADLINE
    bench.drain()
    assert bench.output("b") == []


def test_an_expired_running_request_ends_at_the_next_schedule() -> None:
    bench = Bench(settings())
    bench.submit(request("a", deadline_s=105.0), request("b", max_tokens=3))
    bench.schedule()
    bench.clock.now_s = 106.0
    assert [event.key for event in bench.commit()] == ["a", "b"]
    plan = bench.schedule()
    assert plan is not None
    assert [scheduled.key for scheduled in plan.sequences] == ["b"]
    assert bench.events["a"][-1].finish is FinishReason.DEADLINE
    assert bench.events["a"][-1].position == 1


def test_the_last_request_may_expire() -> None:
    bench = Bench(settings())
    bench.submit(request("a", deadline_s=100.0))
    assert bench.batcher.has_work
    assert bench.schedule() is None
    assert not bench.batcher.has_work
    assert bench.finish("a") is FinishReason.DEADLINE


def test_failure_ends_everything_once() -> None:
    bench = Bench(settings(max_batch_size=2))
    bench.submit(*(request(key) for key in "abcd"))
    bench.schedule()
    bench.cancel("a")
    bench.fail("a rank died")
    bench.submit(request("e", max_tokens=2))
    assert [bench.finish(key) for key in "abcd"] == [FinishReason.CANCELLED, *[FinishReason.FAILED] * 3]
    assert bench.events["b"][-1].error == "a rank died"
    bench.drain()
    bench.check_end()


def test_a_replay_goes_on_behind_the_emitted_tokens() -> None:
    bench = run(request("a", PROMPT, max_tokens=10, output_token_ids=tuple(PATH[:4])))
    assert bench.output("a") == PATH[:10]
    assert [event.position for event in bench.events["a"]] == list(range(4, 10))
    assert bench.events["a"][0].queue_s is not None


@pytest.mark.parametrize(
    ("changes", "finish", "stop_token_id"),
    [
        ({"max_tokens": 4}, FinishReason.LENGTH, None),
        ({"max_tokens": 9, "eos_token_ids": frozenset({PATH[3]})}, FinishReason.STOP, PATH[3]),
        ({"max_tokens": 4, "stop_token_ids": frozenset({PATH[3]})}, FinishReason.STOP, PATH[3]),
    ],
)
def test_a_replay_of_what_was_already_finished_ends_on_arrival(
    changes: dict[str, Any], finish: FinishReason, stop_token_id: int | None
) -> None:
    bench = Bench(settings())
    bench.submit(request("a", PROMPT, output_token_ids=tuple(PATH[:4]), **changes))
    (event,) = bench.events["a"]
    assert (event.finish, event.stop_token_id) == (finish, stop_token_id)
    assert (event.position, event.token_id) == (4, None)
    assert not bench.batcher.has_work


def test_a_replay_that_has_reached_the_model_s_length_ends_on_arrival() -> None:
    bench = Bench(settings(max_model_len=7))
    bench.submit(request("a", PROMPT, output_token_ids=tuple(PATH[:4]), max_tokens=50))
    assert bench.finish("a") is FinishReason.LENGTH


def test_a_replay_that_this_pool_cannot_hold_is_refused() -> None:
    bench = Bench(settings(num_blocks=1))
    bench.submit(request("a", PROMPT, output_token_ids=tuple(PATH[:4]), max_tokens=50))
    assert bench.finish("a") is FinishReason.REFUSED
    assert bench.events["a"][0].position == 4


def test_the_reference_stops_where_the_model_does() -> None:
    wanted = request("a", PROMPT, max_tokens=12, eos_token_ids=frozenset({STOP}))
    assert expected_output(wanted, settings()) == (PATH[: AT + 1], FinishReason.STOP)
