"""What `shoal doctor` prints, and what it exits with."""

from __future__ import annotations

import json
import socket
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli.commands import app
from cluster.doctor import gather as gathering
from cluster.doctor.facts import Wanted
from cluster.doctor.finding import failure, passed, warning
from cluster.doctor.gather import gather, model_there
from cluster.doctor.report import as_json, render
from tests.checkpoints import tiny_llama

FINDINGS = (
    passed("disk", "a", "fine"),
    warning("link", "a - b", "slow", "move"),
    failure("model", "b", "gone", "copy"),
)


def test_people_see_every_fix() -> None:
    console = Console(file=StringIO(), width=60, color_system=None)
    for part in render(FINDINGS):
        console.print(part)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "failure: model on b: copy" in shown
    assert "1 ok, 1 warnings, 1 failures" in shown


def test_scripts_see_everything() -> None:
    answer = json.loads(as_json(FINDINGS))
    assert answer["healthy"] is False
    assert answer["findings"][2] == {"check": "model", "node": "b", "level": "failure", "text": "gone", "fix": "copy"}
    assert json.loads(as_json(FINDINGS[:2]))["healthy"] is True


def test_this_machine_can_be_looked_at() -> None:
    facts = gather(Wanted(), address="127.0.0.1")
    assert facts.versions["ray"] != "missing"
    assert "127.0.0.1" in {address for interface in facts.interfaces for address in interface.addresses}
    assert facts.memory_free_bytes > 0


def test_a_model_is_told_from_half_of_one(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    whole = model_there(str(model))
    assert not whole.problem
    assert whole.digest
    assert model_there(str(tiny_llama(tmp_path / "n"))).digest == whole.digest
    (model / "model.safetensors").unlink()
    assert model_there(str(model)).problem
    assert "is not there" in model_there("/no/such/folder").problem


def _doctor(*arguments: str) -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    return result.exit_code, json.loads(result.stdout) if result.stdout else {}


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_FOLDERS", ())
    config = tmp_path / "shoal.yaml"
    config.write_text("cluster: {port: 0, http_port: 0}")
    code, answer = _doctor("--config", str(config), "--model-path", str(tmp_path / "nothing"))
    assert code == 1
    assert answer["healthy"] is False
    code, _ = _doctor("--config", str(tmp_path / "none.yaml"))
    assert code == 2


def test_a_cluster_that_cannot_be_reached_is_no_diagnosis() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = CliRunner().invoke(app, ["doctor", "--address", f"127.0.0.1:{port}"])
    assert result.exit_code == 2
    assert f"no Ray cluster answers at 127.0.0.1:{port} (Connection refused)" in result.stderr
