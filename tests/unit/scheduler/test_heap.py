"""The heap against a sorted list, and the orders it is used with."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.heap import RemovableHeap
from scheduler.policy import priority_then_arrival, priority_then_deadline
from tests.unit.scheduler.harness import request


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["push", "push", "discard", "pop"]), st.integers(0, 9)), max_size=80))
def test_it_agrees_with_a_sorted_list(acts: list[tuple[str, int]]) -> None:
    heap: RemovableHeap[int] = RemovableHeap()
    model: list[tuple[int, int]] = []
    for number, (act, value) in enumerate(acts):
        if act == "push":
            heap.push((value,), number)
            model.append((value, number))
        elif act == "discard" and model:
            item = model.pop(value % len(model))[1]
            assert heap.discard(item)
            assert not heap.discard(item)
        elif act == "pop" and model:
            model.remove(min(model))
            head = heap.peek()
            assert head is not None
            heap.discard(head[1])
        assert len(heap) == len(model)
        assert set(heap) == {item for _, item in model}
        head = heap.peek()
        assert (None if head is None else (head[0][0], head[1])) == min(model, default=None)


def test_what_is_taken_out_does_not_pile_up() -> None:
    heap: RemovableHeap[int] = RemovableHeap()
    heap.push((-1,), -1)
    for number in range(10_000):
        heap.push((number,), number)
        heap.discard(number)
    assert len(heap._entries) <= 100
    assert heap.peek() == ((-1,), -1)


def test_orders() -> None:
    requests = [
        request("late", arrival_s=3.0),
        request("low", arrival_s=1.0, priority=5),
        request("early", arrival_s=2.0),
        request("urgent", arrival_s=4.0, deadline_s=9.0),
    ]
    by_arrival = [one.key for one in sorted(requests, key=priority_then_arrival)]
    by_deadline = [one.key for one in sorted(requests, key=priority_then_deadline)]
    assert by_arrival == ["early", "late", "urgent", "low"]
    assert by_deadline == ["urgent", "early", "late", "low"]
