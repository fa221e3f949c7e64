"""Block bookkeeping."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.blocks import BlockPool


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(4, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17, 64)] == [0, 1, 1, 2, 4]


def test_the_question_and_the_act_agree() -> None:
    pool = BlockPool(3, 4)
    assert pool.can_allocate(3)
    assert not pool.can_allocate(4)
    assert pool.allocate(0) == []
    first = pool.allocate(2)
    assert len(set(first)) == 2
    assert not pool.can_allocate(2)
    with pytest.raises(AssertionError):
        pool.allocate(2)
    pool.check_integrity([first])


def test_a_shared_block_is_freed_by_its_last_holder() -> None:
    pool = BlockPool(2, 4)
    table = pool.allocate(2)
    pool.share(table[:1])
    pool.release(table)
    assert pool.num_free == 1
    pool.check_integrity([table[:1]])
    pool.release(table[:1])
    assert pool.num_free == 2


@pytest.mark.parametrize("misuse", ["release", "share"])
def test_a_free_block_is_neither_released_nor_shared(misuse: str) -> None:
    pool = BlockPool(2, 4)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError):
        getattr(pool, misuse)(table)


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1, 2]], [[0, 1], [1]]])
def test_check_integrity_notices_a_wrong_table(tables: list[list[int]]) -> None:
    pool = BlockPool(4, 4)
    assert sorted(pool.allocate(2)) == [0, 1]
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["take", "share", "give"]), st.integers(0, 5)), max_size=60))
def test_any_trace_conserves_blocks(acts: list[tuple[str, int]]) -> None:
    pool = BlockPool(8, 4)
    tables: list[list[int]] = []
    for act, number in acts:
        if act == "take" and pool.can_allocate(number):
            tables.append(pool.allocate(number))
        elif act == "share" and tables:
            shared = tables[number % len(tables)]
            pool.share(shared)
            tables.append(list(shared))
        elif act == "give" and tables:
            pool.release(tables.pop(number % len(tables)))
        pool.check_integrity(tables)
        assert pool.num_free == 8 - len({block_id for table in tables for block_id in table})
