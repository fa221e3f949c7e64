"""The command line: quick help, and one line for every failure."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli.commands import app
from cluster.cli.failure import FAILURE, USAGE
from cluster.cli.status import render
from protos.shoal.v1 import admin_pb2
from tests.checkpoints import tiny_llama

runner = CliRunner()


def refused(*arguments: str, code: int) -> str:
    """What `shoal ARGUMENTS` prints as it fails, which must be short and hold no traceback."""
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert all(line.startswith("shoal: ") for line in lines), result.stderr
    return "\n".join(line.removeprefix("shoal: ") for line in lines)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, cluster.cli\n"
        "sys.argv = ['shoal', '--help']\n"
        "try: cluster.cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'grpc', 'pydantic', 'tokenizers', 'fastapi'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "serve" in done.stdout


def test_version() -> None:
    assert runner.invoke(app, ["version"]).stdout.strip()


def test_models_are_listed(tmp_path: Path) -> None:
    result = runner.invoke(app, ["models", "list", "--models-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert "smollm2-135m" in result.stdout
    assert "r1-distill-llama-70b" in result.stdout


def test_pulling_what_is_not_known(tmp_path: Path) -> None:
    message = refused("models", "pull", "nope", "--models-dir", str(tmp_path), code=FAILURE)
    assert message == "no folder and no known model 'nope'; `shoal models list` shows the short names"


def test_serving_with_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text("inference: {max_batchsize: 4}\nmodle: {}\n")
    message = refused("serve", "--config", str(path), code=USAGE)
    assert message.splitlines() == [
        f"{path}: inference.max_batchsize: unknown key; the nearest known key is inference.max_batch_size",
        f"{path}: modle: unknown key; the nearest known key is model",
    ]


def test_serving_to_strangers(tmp_path: Path) -> None:
    assert "security.api_key" in refused("serve", "--host", "0.0.0.0", code=USAGE)


def test_serving_on_a_taken_port(tmp_path: Path, taken_port: int) -> None:
    tiny = str(tiny_llama(tmp_path / "tiny"))
    message = refused("serve", "--model-path", tiny, "--port", str(taken_port), "--http-port", "0", code=FAILURE)
    assert message == f"cluster.port: port {taken_port} on 127.0.0.1 is in use; choose another with --port"
    message = refused("serve", "--model-path", tiny, "--http-port", str(taken_port), "--port", "0", code=FAILURE)
    assert message == f"cluster.http_port: port {taken_port} on 127.0.0.1 is in use; choose another with --http-port"


def test_serving_what_is_no_model(tmp_path: Path) -> None:
    options = ("--port", "0", "--http-port", "0")
    assert "it has no config.json" in refused("serve", "--model-path", str(tmp_path), *options, code=FAILURE)
    tiny = tiny_llama(tmp_path / "tiny")
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    assert "pickled" in refused("serve", "--model-path", str(tiny), *options, code=FAILURE)


def test_serving_with_a_plan_that_does_not_divide(tmp_path: Path) -> None:
    tiny = str(tiny_llama(tmp_path / "tiny"))
    options = ("--port", "0", "--http-port", "0", "--model-path", tiny)
    assert "parallel.tensor 3 must divide" in refused("serve", *options, "--tensor", "3", code=USAGE)


def test_asking_nobody_for_status() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert (
        refused("status", "--address", f"127.0.0.1:{port}", code=FAILURE) == f"127.0.0.1:{port}: no front door answers"
    )


def test_status_shows_everything() -> None:
    answer = admin_pb2.StatusResponse(version="1", model="m", warnings=["sums go over gloo"])
    engine = answer.engines.add(name="engine-0", state="ready", generation=3, plan="tensor 2", dtype="float32")
    engine.collectives = "gloo (no compiler)"
    engine.version, engine.weight = "7", 0.25
    engine.dp_groups.add(index=0, address="127.0.0.1:5", num_running=4, num_blocks=9, block_size=16)
    engine.ranks.add(rank=1, node="n1", pid=42, device="cpu", threads=2, weight_bytes=1 << 20)
    engine.dp_groups.add(index=1, draining=True)
    answer.front_doors.add(id="door", node="n1", open_requests=5, dp_groups=["engine-0/0"], draining=True)
    console = Console(width=200, record=True, file=StringIO())
    for part in render(answer):
        console.print(part)
    text = console.export_text()
    for expected in ("generation 3", "gloo (no compiler)", "127.0.0.1:5", "1.0 MiB", "42", "door", "warning"):
        assert expected in text
    for expected in ("version 7 (25% of the requests)", "1, draining", "door, draining"):
        assert expected in text


def test_another_name_of_serve(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({"clutser": {}}))
    code = (
        f"import sys, cluster.cli; sys.argv = ['deepseek-serve', '--config', {str(path)!r}]; cluster.cli.serve_main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == USAGE
    assert "the nearest known key is cluster" in done.stderr
