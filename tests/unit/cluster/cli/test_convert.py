"""`shoal convert` as people call it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.commands import app
from tests.checkpoints import tiny_deepseek

_runner = CliRunner()


def test_convert_and_verify(tmp_path: Path) -> None:
    tiny_deepseek(tmp_path / "source")
    target = tmp_path / "target"
    done = _runner.invoke(app, ["convert", str(tmp_path / "source"), str(target), "--quantization", "int8"])
    assert done.exit_code == 0, done.output
    assert (target / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert _runner.invoke(app, ["convert", "--verify", str(target)]).exit_code == 0
    (target / "config.json").write_text("{}")
    assert _runner.invoke(app, ["convert", "--verify", str(target)]).exit_code == 1


@pytest.mark.parametrize("options", [["--quantization", "int3"], ["--dtype", "int8"], ["--max-shard-size", "big"]])
def test_what_cannot_be_is_refused(tmp_path: Path, options: list[str]) -> None:
    assert _runner.invoke(app, ["convert", str(tmp_path), str(tmp_path / "t"), *options]).exit_code == 2
    assert _runner.invoke(app, ["convert", str(tmp_path)]).exit_code == 2
