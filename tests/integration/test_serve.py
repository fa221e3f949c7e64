"""`shoal serve` with one engine: both doors, status, a clean end, and clean refusals."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.cli.failure import FAILURE
from protos.shoal.v1 import inference_pb2
from tests.checkpoints import tiny_llama
from tests.integration.served import Served, run_shoal, serving

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serving(model, config="parallel: auto\n") as server:
        yield server


def _http(served: Served, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.http_port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert isinstance(answer, dict)
    return answer


def test_both_doors_give_the_same_tokens(served: Served) -> None:
    over_grpc = served.tokens("A shoal is", max_tokens=24)
    assert len(over_grpc) == 24
    body: dict[str, object] = {"model": "tiny", "prompt": "A shoal is", "max_tokens": 24, "temperature": 0}
    answer = _http(served, "/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
    choices = answer["choices"]
    assert isinstance(choices, list)
    assert choices[0]["token_ids"] == over_grpc


def test_what_is_served_is_told(served: Served) -> None:
    models = served.inference.ListModels(inference_pb2.ListModelsRequest())
    assert [(model.name, model.max_model_len) for model in models.models] == [("tiny", 4096)]
    assert _http(served, "/readyz")
    status = served.status()
    assert status.model == "tiny"
    (engine,) = status.engines
    assert (engine.name, engine.state, engine.generation) == ("engine-0", "ready", 1)
    assert engine.plan == "data 1 x pipeline 1 x tensor 1"
    assert engine.plan_reasons[0] == "tensor 1: the model fits one rank, so that no rank waits for another in a layer"
    assert f"  {engine.plan_reasons[0]}\n" in served.output, "the log of the start says it, too"
    assert [group.address.split(":")[0] for group in engine.dp_groups] == ["127.0.0.1"], "not open to strangers"
    assert engine.dp_groups[0].num_blocks > 0
    assert len(engine.ranks) == 1
    assert engine.ranks[0].weight_bytes > 0
    assert [list(door.dp_groups) for door in status.front_doors] == [["engine-0/0"]]


def test_status_as_a_command(served: Served) -> None:
    address = f"127.0.0.1:{served.port}"
    shown = run_shoal("status", "--address", address)
    assert "engine-0: ready" in shown.stdout
    assert "tensor 1: the model fits one rank" in " ".join(shown.stdout.split())
    as_json = run_shoal("status", "--address", address, "--json")
    assert json.loads(as_json.stdout)["engines"][0]["state"] == "ready"


def test_the_start_was_told_in_few_lines(served: Served) -> None:
    lines = [line for line in served.output.splitlines() if line.strip()]
    assert lines[0].startswith("starting tiny (")
    assert lines[1] == "plan: data 1 x pipeline 1 x tensor 1"
    assert lines[-1] == f"  HTTP  http://127.0.0.1:{served.http_port}/v1"
    assert len(lines) < 12
    assert "Traceback" not in served.output


def test_a_second_server_on_the_port_is_refused(served: Served, model: Path) -> None:
    done = run_shoal("serve", "--model-path", str(model), "--port", str(served.port), "--http-port", "0")
    assert done.returncode == FAILURE
    message = f"shoal: cluster.port: port {served.port} on 127.0.0.1 is in use; choose another with --port"
    assert done.stderr.strip() == message
    assert served.tokens("still there", max_tokens=2)


def test_ctrl_c_finishes_what_is_open_and_leaves_nothing(served: Served) -> None:
    expected = served.tokens("The quick brown", max_tokens=2000)
    stream = served.stream("The quick brown", max_tokens=2000)
    first = next(stream)
    served.interrupt()
    rest = [token for chunk in stream for token in chunk.token_ids]
    assert [*first.token_ids, *rest] == expected, "the open request was finished"
    assert served.process.wait(timeout=40) == 0
    assert served.output.rstrip().endswith("stopped")
    served.expect_nothing_left()


def test_a_missing_shard_is_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done = run_shoal("serve", "--model-path", str(folder), "--port", "0", "--http-port", "0")
    assert done.returncode == FAILURE
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("shoal: ")
    assert "model-00002-of-00002.safetensors" in line
    assert "starting" not in done.stderr


def test_a_fault_that_only_a_rank_can_see_is_one_line_too(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors")
    done = run_shoal("serve", "--model-path", str(folder), "--port", "0", "--http-port", "0")
    assert done.returncode == FAILURE
    errors = [line for line in done.stderr.splitlines() if line.startswith("shoal: ")]
    assert len(errors) == 1
    assert "model.norm.weight" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
