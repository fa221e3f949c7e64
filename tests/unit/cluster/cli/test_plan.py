"""`shoal plan` on clusters that nobody has rented yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.commands import app
from cluster.cli.failure import FAILURE, USAGE
from tests.unit.cluster.config.family import FAMILY

runner = CliRunner()


@pytest.fixture
def r1(tmp_path: Path) -> str:
    """A folder with nothing but a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(FAMILY["V3"]))
    return str(tmp_path)


def test_a_cluster_to_be_rented(r1: str) -> None:
    asked = ["plan", "--model-path", r1, "--nodes", "2", "--gpus-per-node", "8", "--gpu-memory", "80GB"]
    shown = runner.invoke(app, [*asked, "--quantization", "fp8"])
    assert shown.exit_code == 0, shown.output
    assert "on 2 nodes with 16 GPUs in all" in shown.stdout
    assert "parallel: {data: 16, pipeline: 1, tensor: 1, redundant_experts: 0}" in shown.stdout
    assert "256 experts are spread over 16 ranks, 16 on each" in shown.stdout
    document = json.loads(runner.invoke(app, [*asked, "--quantization", "fp8", "--json"]).stdout)
    assert document["parallel"] == {"data": 16, "pipeline": 1, "tensor": 1, "redundant_experts": 0}
    assert document["rank_memory"]["weight_bytes"] > 58 * 2**30
    assert document["reasons"]


def test_one_that_is_too_small_says_what_would_do(r1: str) -> None:
    asked = ["plan", "--model-path", r1, "--gpus-per-node", "8", "--gpu-memory", "80GB", "--quantization", "fp8"]
    refused = runner.invoke(app, asked)
    assert refused.exit_code == FAILURE
    assert refused.stderr.startswith("shoal: parallel: not enough memory")
    assert "what would fit: 2 nodes like this one" in refused.stderr


def test_a_plan_that_is_given_is_only_checked(r1: str, tmp_path: Path) -> None:
    given = tmp_path / "shoal.yaml"
    given.write_text("parallel: {tensor: 8, pipeline: 2}\ninference: {quantization: fp8}\n")
    asked = ["plan", "--model-path", r1, "--config", str(given), "--nodes", "2", "--gpus-per-node", "8"]
    shown = runner.invoke(app, [*asked, "--gpu-memory", "80GB"])
    assert shown.exit_code == 0, shown.output
    assert "parallel: {data: 1, pipeline: 2, tensor: 8, redundant_experts: 0}" in shown.stdout
    assert runner.invoke(app, asked).exit_code == USAGE, "the memory of a GPU is not known"


def test_what_is_no_model(tmp_path: Path) -> None:
    refused = runner.invoke(app, ["plan", "--model-path", str(tmp_path)])
    assert refused.exit_code == FAILURE
    assert "it has no config.json" in refused.stderr
