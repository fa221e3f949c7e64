"""Shares of the requests by version."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.versions import pick_version


def _shares(there: list[str], weights: dict[str, float], points: int = 1000) -> dict[str, float]:
    picked = [pick_version(there, weights, at / points) for at in range(points)]
    return {name: picked.count(name) / points for name in there}


def test_shares_follow_the_weights() -> None:
    assert _shares(["1", "2"], {"1": 0.9, "2": 0.1}) == {"1": 0.9, "2": 0.1}
    assert _shares(["1", "2"], {}) == {"1": 0.5, "2": 0.5}
    assert _shares(["1", "2"], {"2": 0.0}) == {"1": 1.0, "2": 0.0}


def test_an_answer_from_the_wrong_version_is_better_than_none() -> None:
    assert _shares(["2"], {"2": 0.0}) == {"2": 1.0}
    assert _shares(["2", "3"], {"2": 0.0, "3": 0.0}) == {"2": 0.5, "3": 0.5}
    assert pick_version([], {}, 0.5) is None


def test_what_was_begun_on_a_version_goes_on_there() -> None:
    assert pick_version(["1", "2"], {"1": 0.0}, 0.5, keep="1") == "1"
    assert pick_version(["2"], {}, 0.5, keep="1") == "2"


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1e6), min_size=1),
    st.floats(0, 1, exclude_max=True),
)
def test_a_version_without_a_share_is_never_picked(weights: dict[str, float], point: float) -> None:
    picked = pick_version(weights, weights, point)
    assert picked in weights
    assert weights[picked] > 0 or not any(weights.values())
