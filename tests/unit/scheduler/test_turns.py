"""How prefills share a step."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.sequence import Sequence
from scheduler.turns import turns
from tests.unit.scheduler.harness import Bench, request
from tests.unit.scheduler.harness import settings as limits


def prefill(index: int, num_tokens: int, priority: int = 0) -> Sequence:
    one = request(str(index), num_tokens, priority=priority)
    return Sequence.open(one, order=(priority, index), max_output_tokens=1)


def taken(prefills: list[Sequence], num_tokens: int) -> dict[str, int]:
    """What each takes if nothing else holds it back."""
    left = num_tokens
    taken = {}
    for sequence, to_leave in turns(prefills, num_tokens):
        taken[sequence.request.key] = max(0, min(sequence.num_remaining, left - to_leave))
        left -= taken[sequence.request.key]
    return taken


def test_a_short_prompt_goes_before_the_rest_of_a_long_one() -> None:
    assert taken([prefill(0, 8000), prefill(1, 100)], 512) == {"1": 100, "0": 412}


def test_the_first_is_left_a_quarter() -> None:
    assert taken([prefill(0, 8000), prefill(1, 500), prefill(2, 300)], 512) == {"2": 300, "1": 84, "0": 128}


def test_equals_go_in_their_order() -> None:
    assert taken([prefill(1, 500), prefill(0, 500)], 512) == {"0": 500, "1": 12}


def test_a_class_goes_before_the_next_whatever_its_lengths() -> None:
    assert taken([prefill(0, 10, priority=1), prefill(1, 500)], 400) == {"1": 400, "0": 0}


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 1)), min_size=1, max_size=8), st.integers(1, 400))
def test_nothing_is_wasted_and_the_first_moves_on(lengths: list[tuple[int, int]], num_tokens: int) -> None:
    prefills = [prefill(index, length, priority) for index, (length, priority) in enumerate(lengths)]
    took = taken(prefills, num_tokens)
    assert sum(took.values()) == min(num_tokens, sum(length for length, _ in lengths))
    first = min(prefills, key=lambda sequence: sequence.order)
    assert took[first.request.key] >= min(first.num_remaining, max(1, num_tokens // 4))


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    bench = Bench(limits(max_batch_tokens=32, max_model_len=1024, num_blocks=512))
    bench.submit(request("long", 800, max_tokens=1))
    bench.step()
    bench.submit(request("longer", 900, max_tokens=1), request("short", 20, max_tokens=1))
    bench.step()
    assert bench.output("short")
    bench.drain()
    bench.check_end()


def test_an_endless_row_of_short_prompts_does_not_starve_a_long_one() -> None:
    rng = random.Random(5)
    bench = Bench(limits(max_batch_tokens=32, max_model_len=1024, num_blocks=512, prefix_cache=False))
    bench.submit(request("long", 400, max_tokens=1))
    num_steps = 0
    while not bench.output("long"):
        for index in range(4):
            key = f"{num_steps}:{index}"
            bench.submit(request(key, rng.randint(8, 16), max_tokens=1, arrival_s=101.0))
        bench.step()
        num_steps += 1
    assert num_steps <= 400 // 8
    bench.drain()
    bench.check_end()
