"""Stop strings: the result depends on the text, never on how it was cut into pieces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.front_door.stops import StopScanner


def _scan(pieces: Sequence[str], stops: Sequence[str], *, include: bool = False) -> tuple[list[str], str | None]:
    """What each piece released (the end's included), and the stop string found."""
    scanner = StopScanner(stops, include_in_output=include)
    released = []
    for piece in pieces:
        released.append(scanner.push(piece))
        if scanner.matched is not None:
            return released, scanner.matched
    released.append(scanner.finish())
    return released, None


def _naive(text: str, stops: Sequence[str], *, include: bool) -> tuple[str, str | None]:
    """Character by character: the first that completes a stop string ends it, the longest stop string wins."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@pytest.mark.parametrize(
    ("pieces", "stops", "expected", "matched"),
    [
        (["one ", "two"], ["three"], ["one ", "two", ""], None),
        (["hello STOP there"], ["STOP"], ["hello "], "STOP"),
        (["hello ST", "OP there"], ["STOP"], ["hello ", ""], "STOP"),
        (["S", "T", "O", "P"], ["STOP"], ["", "", "", ""], "STOP"),
        (["S", "T", "ILL"], ["STOP"], ["", "", "STILL", ""], None),
        (["trailing ST"], ["STOP"], ["trailing ", "ST"], None),
        (["aab"], ["ab"], ["a"], "ab"),
        (["a", "a", "b"], ["aab", "ab"], ["", "", ""], "aab"),
        (["abc"], ["abcd", "b"], ["a"], "b"),
        (["", "x", ""], ["y"], ["", "x", "", ""], None),
        (["\n", "\nUser:"], ["\n\nUser:", "\n\n"], ["", ""], "\n\n"),
    ],
)
def test_pieces(pieces: list[str], stops: list[str], expected: list[str], matched: str | None) -> None:
    assert _scan(pieces, stops) == (expected, matched)


def test_the_stop_string_may_be_kept() -> None:
    assert _scan(["ab S", "TOP cd"], ["STOP"], include=True) == (["ab S", "TOP"], "STOP")


def test_nothing_is_held_back_where_the_stop_string_is_kept() -> None:
    assert _scan(["ST"], ["STOP"], include=True)[0][0] == "ST"


def test_unarmed_text_is_no_match_but_may_begin_one() -> None:
    scanner = StopScanner(["stop"], include_in_output=False)
    assert scanner.push("stop st", armed=False) == "stop "
    assert scanner.matched is None
    assert scanner.push("op", armed=True) == ""
    assert scanner.matched == "stop"


@settings(deadline=None, derandomize=True)
@given(
    text=st.text("ab\n", max_size=40),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=10),
    include=st.booleans(),
)
def test_any_cut_gives_what_the_whole_text_gives(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    released, matched = _scan(pieces, stops, include=include)
    assert ("".join(released), matched) == _naive(text, stops, include=include)
