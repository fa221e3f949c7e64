"""Prefix reuse: what is found, by whom, from when on, and that no output changes by it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.plan import Event, StepPlan
from scheduler.prefix import extend_hashes, hash_of_tenant
from tests.unit.scheduler.harness import Bench, request
from tests.unit.scheduler.harness import settings as limits

PROMPT = list(range(18))


def bench_of(**changes: Any) -> Bench:
    return Bench(limits(**({"prefix_wait_tokens": 4} | changes)))


def cached(bench: Bench, key: str) -> int:
    """What the first token's event said."""
    first: Event = bench.events[key][0]
    return first.num_cached_tokens


def computed(plan: StepPlan) -> dict[str, tuple[int, int]]:
    return {one.key: (one.num_computed, one.num_tokens) for one in plan.sequences}


def test_a_second_request_computes_only_what_is_new() -> None:
    bench = bench_of()
    bench.submit(request("a", PROMPT, max_tokens=1))
    bench.step()
    bench.submit(request("b", [*PROMPT[:13], 1, 2, 3], max_tokens=1))
    assert computed(bench.step()) == {"b": (12, 4)}
    assert (cached(bench, "a"), cached(bench, "b")) == (0, 12)
    load = bench.batcher.load()
    assert (load.prefix_hit_tokens, load.prefix_query_tokens) == (12, 34)
    bench.check_end()


def test_one_token_is_always_computed() -> None:
    bench = bench_of()
    bench.submit(request("a", PROMPT[:16], max_tokens=1))
    bench.step()
    bench.submit(request("b", PROMPT[:16], max_tokens=1), request("c", PROMPT[:17], max_tokens=1))
    assert computed(bench.step()) == {"c": (16, 1), "b": (12, 4)}
    bench.check_end()


def test_a_turn_finds_the_prompt_and_the_answer_of_the_one_before() -> None:
    bench = bench_of()
    bench.submit(request("a", PROMPT[:6], max_tokens=8))
    bench.drain()
    history = [*PROMPT[:6], *bench.output("a")]
    bench.submit(request("b", [*history, 5, 6, 7], max_tokens=2))
    bench.drain()
    assert cached(bench, "b") == 12  # the last of the 14 tokens was never run
    bench.check_end()


def test_blocks_are_found_only_when_they_are_computed() -> None:
    bench = bench_of(prefix_wait_tokens=64, max_batch_tokens=8)
    bench.submit(request("a", PROMPT, max_tokens=1))
    bench.step()
    bench.submit(request("b", PROMPT, max_tokens=1))
    bench.schedule()
    assert bench.plan is not None
    assert computed(bench.plan) == {"a": (8, 8)}
    bench.commit()
    assert computed(bench.step()) == {"a": (16, 2), "b": (16, 2)}
    bench.check_end()


@pytest.mark.parametrize("num_branches", [2, 5])
def test_branches_wait_for_the_first_and_share_its_full_blocks(num_branches: int) -> None:
    bench = bench_of()
    keys = [f"b{index}" for index in range(num_branches)]
    bench.submit(*(request(key, PROMPT, max_tokens=3) for key in keys))
    assert computed(bench.step()) == {"b0": (0, 18)}
    assert computed(bench.step()) == {"b0": (18, 1)} | dict.fromkeys(keys[1:], (16, 2))
    held = bench.limits.num_blocks - bench.batcher.load().num_free_blocks
    assert held == 4 + num_branches
    assert [cached(bench, key) for key in keys] == [0] + [16] * (num_branches - 1)
    bench.drain()
    bench.check_end()


def test_nobody_waits_for_a_prefix_that_spares_little() -> None:
    bench = bench_of(prefix_wait_tokens=20)
    bench.submit(request("a", PROMPT, max_tokens=1), request("b", PROMPT, max_tokens=1))
    assert computed(bench.step()) == {"a": (0, 18), "b": (0, 18)}
    bench.check_end()


def test_who_waits_goes_on_alone_when_the_first_is_cancelled() -> None:
    bench = bench_of(max_batch_tokens=8)
    bench.submit(request("a", PROMPT, max_tokens=1), request("b", PROMPT, max_tokens=1))
    bench.schedule()
    bench.cancel("a")
    bench.commit()
    assert computed(bench.step()) == {"b": (0, 8)}
    bench.drain()
    bench.check_end()


def test_a_long_common_prefix_is_computed_once_over_many_steps() -> None:
    bench = bench_of(max_batch_tokens=6, num_blocks=128)
    prompt = [index % 19 for index in range(48)]
    bench.submit(*(request(key, [*prompt, index], max_tokens=1) for index, key in enumerate("abcd")))
    num_tokens = 0
    while bench.batcher.has_work:
        num_tokens += bench.step().num_tokens
    assert num_tokens == 48 + 4
    bench.check_end()


def test_a_preempted_sequence_finds_its_own_blocks_again_uncounted() -> None:
    bench = bench_of(num_blocks=7)
    bench.submit(request("a", [1, 2, 3, 4, 5], max_tokens=12), request("b", [6, 7, 8, 9, 10], max_tokens=12))
    num_tokens = 0
    while bench.batcher.has_work:
        num_tokens += bench.step().num_tokens
    assert bench.batcher.load().num_preemptions >= 1
    assert num_tokens == 2 * (5 + 11)
    assert bench.batcher.load().prefix_hit_tokens == 0
    assert cached(bench, "b") == 0
    bench.check_end()


def test_tenants_share_nothing_unless_told() -> None:
    for share, expected in ((False, 0), (True, 16)):
        bench = bench_of(share_prefixes=share)
        bench.submit(request("a", PROMPT, tenant="one", max_tokens=1))
        bench.step()
        bench.submit(request("b", PROMPT, tenant="two", max_tokens=1))
        bench.drain()
        assert cached(bench, "b") == expected
        bench.check_end()


def test_the_switch() -> None:
    bench = bench_of(prefix_cache=False)
    for key in "ab":
        bench.submit(request(key, PROMPT, max_tokens=1))
        bench.drain()
    load = bench.batcher.load()
    assert (cached(bench, "b"), load.prefix_hit_tokens, load.prefix_query_tokens) == (0, 0, 0)


def test_prompt_logprobs_are_computed_not_found() -> None:
    bench = bench_of()
    for key in "ab":
        bench.submit(request(key, PROMPT, max_tokens=2, prompt_logprobs=0))
        bench.drain()
    assert cached(bench, "b") == 0
    assert len(bench.events["b"][0].prompt_logprobs) == len(PROMPT) - 1
    bench.submit(request("c", PROMPT, max_tokens=2))
    bench.drain()
    assert cached(bench, "c") == 16


def test_the_blocks_idle_for_longest_go_first_and_the_last_of_a_prefix_before_its_first() -> None:
    bench = bench_of(num_blocks=10)
    bench.submit(request("old", [1] * 16, max_tokens=1))
    bench.drain()
    bench.submit(request("new", [2] * 16, max_tokens=1))
    bench.drain()
    bench.submit(request("c", [3] * 16, max_tokens=1))  # takes the two blocks that hold nothing, and two of "old"
    bench.drain()
    for key, token_id, expected in (("old again", 1, 8), ("new again", 2, 8)):
        bench.submit(request(key, [token_id] * 16, max_tokens=1))
        bench.drain()
        assert cached(bench, key) == expected
    bench.check_end()


def test_use_makes_a_block_young_again() -> None:
    bench = bench_of(num_blocks=8, max_batch_size=1)
    for key, token_id in (("a", 1), ("b", 2), ("a again", 1), ("c", 3)):
        bench.submit(request(key, [token_id] * 13, max_tokens=1))
        bench.drain()
    bench.submit(request("a at last", [1] * 13, max_tokens=1))
    bench.drain()
    assert cached(bench, "a at last") == 12


def test_a_failure_publishes_nothing_of_the_step_in_flight() -> None:
    bench = bench_of()
    bench.submit(request("a", PROMPT))
    bench.schedule()
    bench.fail("a rank died")
    bench.submit(request("b", PROMPT, max_tokens=1))
    bench.drain()
    assert cached(bench, "b") == 0


histories = st.lists(st.integers(0, 2), max_size=12)


@settings(deadline=None, derandomize=True)
@given(histories, histories, st.integers(1, 4))
def test_hashes_are_equal_where_histories_are(one: list[int], other: list[int], block_size: int) -> None:
    hashes: tuple[list[bytes], list[bytes]] = ([], [])
    for token_ids, found in zip((one, other), hashes, strict=True):
        extend_hashes(found, token_ids[: len(token_ids) // 2], block_size, root=b"root")
        extend_hashes(found, token_ids, block_size, root=b"root")
        assert len(found) == len(token_ids) // block_size
    for index, (mine, theirs) in enumerate(zip(*hashes, strict=False), 1):
        assert (mine == theirs) == (one[: index * block_size] == other[: index * block_size])


def test_roots_differ_by_tenant_and_by_key() -> None:
    roots = {hash_of_tenant(tenant, key=key) for tenant in (None, "", "a", "all") for key in (b"", b"k")}
    assert len(roots) == 8
    plain: list[bytes] = []
    keyed: list[bytes] = []
    extend_hashes(plain, [1, 2], 2, root=b"r")
    extend_hashes(keyed, [1, 2], 2, root=b"r", key=b"k")
    assert plain != keyed
