"""Positions and the latencies of one request."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.record import PositionChecker, Recorder
from loadtest.workload import Work

WORK = Work(prompt=(1, 2, 3), num_output_tokens=4)


def _checked(pushes: Iterable[tuple[int, int, int]]) -> PositionChecker:
    checker = PositionChecker()
    for index, position, num_tokens in pushes:
        checker.push(index, position, num_tokens)
    return checker


def test_contiguous_positions_are_no_fault() -> None:
    assert _checked([(0, 0, 1), (0, 1, 3), (0, 4, 1)]).fault == ""


def test_choices_are_counted_apart() -> None:
    assert _checked([(0, 0, 2), (1, 0, 1), (0, 2, 1), (1, 1, 1)]).fault == ""


@pytest.mark.parametrize(
    ("pushes", "repeated", "skipped"),
    [
        ([(0, 0, 2), (0, 1, 1)], 1, 0),
        ([(0, 0, 2), (0, 1, 3)], 1, 0),
        ([(0, 0, 5), (0, 2, 2), (0, 5, 1)], 2, 0),
        ([(0, 1, 1)], 0, 1),
        ([(0, 0, 1), (0, 5, 1)], 0, 4),
        ([(0, 0, 1), (0, 2, 1), (0, 1, 1)], 1, 1),
    ],
)
def test_repeats_and_skips_are_counted(pushes: list[tuple[int, int, int]], repeated: int, skipped: int) -> None:
    checker = _checked(pushes)
    assert (checker.num_repeated, checker.num_skipped) == (repeated, skipped)
    assert checker.fault == f"positions: {repeated} repeated, {skipped} skipped"


@given(st.lists(st.integers(0, 4), min_size=1), st.data())
def test_any_chunking_is_good_and_any_loss_is_seen(sizes: list[int], data: st.DataObject) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pushes = [(0, start, size) for start, size in zip(starts, sizes, strict=True)]
    assert _checked(pushes).fault == ""
    behind = [index for index, size in enumerate(sizes) if size and any(sizes[index + 1 :])]
    if behind:
        lost = data.draw(st.sampled_from(behind))
        assert _checked(pushes[:lost] + pushes[lost + 1 :]).num_skipped == sizes[lost]


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_latencies_start_at_the_intended_time() -> None:
    clock = _Clock()
    clock.now_s = 11.0
    recorder = Recorder("grpc", WORK, 10.0, clock)
    for at_s, position, num_tokens in [(12.0, 0, 1), (12.5, 1, 1), (14.0, 2, 2)]:
        clock.now_s = at_s
        recorder.tokens(num_tokens, position=position)
    recorder.finish_reason()
    clock.now_s = 14.25
    record = recorder.close()
    assert record.error == ""
    assert record.send_delay_s == 1.0
    assert record.ttft_s == 2.0
    assert record.tpot_s == pytest.approx(2.0 / 3)
    assert record.gaps_s == (0.5, 1.5)
    assert record.e2e_s == 4.25


def test_an_answer_in_one_message_has_no_time_per_token() -> None:
    recorder = Recorder("grpc", WORK, 0.0, _Clock())
    recorder.tokens(4, position=0)
    recorder.finish_reason()
    record = recorder.close()
    assert record.error == ""
    assert record.tpot_s is None
    assert record.gaps_s == ()


def test_no_answer_has_no_first_token() -> None:
    record = Recorder("grpc", WORK, 0.0, _Clock()).close("UNAVAILABLE: gone")
    assert record.ttft_s is None
    assert record.tpot_s is None
    assert record.error == "UNAVAILABLE: gone"


def test_a_short_answer_is_an_error() -> None:
    recorder = Recorder("grpc", WORK, 0.0, _Clock())
    recorder.tokens(3, position=0)
    assert "finish reason" in recorder.close().error
    recorder.finish_reason()
    assert recorder.close().error == "3 tokens came where 4 were asked for"


def test_an_answer_that_may_end_early_may_be_short() -> None:
    recorder = Recorder("grpc", Work(prompt="hello", num_output_tokens=9, ignore_eos=False), 0.0, _Clock())
    recorder.tokens(3, position=0)
    recorder.finish_reason()
    assert recorder.close().error == ""
