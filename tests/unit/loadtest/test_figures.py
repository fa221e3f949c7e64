"""The figures go where they belong, each with its command."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest import figures
from loadtest.peers.comparison import Figure, Findings

GOOD = Findings(title="T", peer="", figures=(Figure(what="x", unit="s", ours=(1.0,), goal=0.5),), facts={})
MISSED = Findings(title="T", peer="", figures=(Figure(what="x", unit="s", ours=(1.0,), goal=2.0),), facts={})


def test_results_have_a_place_for_every_section() -> None:
    text = figures.RESULTS.read_text()
    for name in figures.SECTIONS:
        assert "here" in figures.replace_section(text, name, "here\n")


def test_no_figure_is_without_its_command() -> None:
    for name in figures.SECTIONS:
        _, _, rest = figures.RESULTS.read_text().partition(f"<!-- begin {name} -->\n")
        body, _, _ = rest.partition("<!-- end")
        assert not body or f"`python -m {figures.SECTIONS[name]}`" in body


def test_only_the_named_section_changes() -> None:
    text = "a\n<!-- begin one -->\nold\n<!-- end one -->\nb\n<!-- begin two -->\nkept\n<!-- end two -->\n"
    changed = figures.replace_section(text, "one", r"new \1" + "\n")
    assert changed == text.replace("old", r"new \1")


@pytest.mark.parametrize("text", ["", "<!-- begin one -->\n<!-- end one -->\n" * 2])
def test_a_missing_or_double_section_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not one"):
        figures.replace_section(text, "one", "new\n")


@pytest.mark.parametrize(("findings", "status"), [(GOOD, 0), (MISSED, 1)])
def test_taking_a_section(findings: Findings, status: int, tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    results.write_text(figures.RESULTS.read_text())
    asked: list[str] = []

    def take(module: str) -> tuple[str, Findings]:
        asked.append(module)
        return f"python -m {module}", findings

    assert figures.main(["startup"], results=results, take=take) == status
    assert asked == ["loadtest.peers.startup"]
    text = results.read_text()
    assert "| x (s) | 1 |" in text
    assert "`python -m loadtest.peers.startup`, 2" in text
    assert "; commit " in text


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        figures.main(["nothing"])
    assert "no section 'nothing'" in capsys.readouterr().err
