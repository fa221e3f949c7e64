"""What a comparison says of its rounds."""

from __future__ import annotations

import pytest

from loadtest.peers.comparison import Figure, Findings


def test_a_ratio_is_of_medians() -> None:
    figure = Figure(what="decode", unit="tokens/s", ours=(10.0, 30.0, 20.0), peers=(1.0, 100.0, 10.0), goal=2.0)
    assert figure.ratio == 2.0
    assert figure.reached is True
    assert (
        figure.row()
        == "| decode (tokens/s) | 20 (10 to 30, 3 rounds) | 10 (1 to 100, 3 rounds) | 2.00x | >= 2x: reached |"
    )


@pytest.mark.parametrize(("ours", "reached"), [(24.0, True), (25.0, True), (26.0, False)])
def test_a_goal_may_be_a_most(ours: float, reached: bool) -> None:
    figure = Figure(what="start", unit="s", ours=(ours,), goal=25.0, goal_is_most=True)
    assert figure.reached is reached
    assert figure.row().endswith(f"| - | - | <= 25 s: {'reached' if reached else 'MISSED'} |")


def test_a_missed_ratio_is_said() -> None:
    figure = Figure(what="x", unit="s", ours=(1.0,), peers=(1.0,), goal=1.2)
    assert "MISSED" in figure.row()


def test_without_a_goal_nothing_is_reached_or_missed() -> None:
    figure = Figure(what="x", unit="s", ours=(1.0,))
    assert figure.reached is None
    assert figure.row() == "| x (s) | 1 | - | - | - |"


@pytest.mark.parametrize(("ours", "peers"), [((), ()), ((1.0, 2.0), (1.0,))])
def test_lost_rounds_are_refused(ours: tuple[float, ...], peers: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="x: "):
        Figure(what="x", unit="s", ours=ours, peers=peers)


def test_findings_survive_json() -> None:
    figures = (
        Figure(what="a", unit="s", ours=(1.0, 2.0), peers=(2.0, 3.0), goal=1.0),
        Figure(what="b", unit="s", ours=(1.0,)),
    )
    findings = Findings(title="T", peer="other", figures=figures, facts={"k": "v"})
    assert Findings.from_json(findings.to_json()) == findings
    text = findings.markdown()
    assert text.startswith("**T**")
    assert "| | Shoal | other | ratio | goal |" in text
    assert text.endswith("- k: v")
