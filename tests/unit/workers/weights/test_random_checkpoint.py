"""Checkpoints made without transformers: readable by it and by us, the same every time, sharded, in FP8."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import tiny_deepseek, tiny_llama
from tests.unit.workers.model.stepping import TOLERANCE, distance, expected_logits, run, sequences
from tests.unit.workers.ranks import Ranks
from workers.model.config import parse_config, read_config
from workers.weights import random_checkpoint
from workers.weights.index import read_index
from workers.weights.layout import has_fused_experts, log_skipped_layers
from workers.weights.write import TensorSpec, write_checkpoint


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_deepseek(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ranks = Ranks(folder)
    (sequence,) = sequences(1, seed=1)
    run(ranks, [(sequence, len(sequence.token_ids))])
    ranks.close()
    assert distance(sequence, expected_logits(model, sequence)) <= TOLERANCE
    assert len(set(torch.cat(sequence.logits).argmax(dim=-1).tolist())) > 10


def test_the_command_makes_the_same_checkpoint_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = json.loads((tiny_deepseek(tmp_path / "tiny") / "config.json").read_text())
    monkeypatch.setattr(random_checkpoint, "SHAPES", {"v3": tiny})
    llama = tiny_llama(tmp_path / "llama")
    for name in ("a", "b"):
        random_checkpoint.main(
            [str(tmp_path / name), "--shape", "v3", "--layers", "2", "--fp8", "--tokenizer-from", str(llama)]
        )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert {name: value.view(torch.uint8).tolist() for name, value in first.items()} == {
        name: value.view(torch.uint8).tolist() for name, value in second.items()
    }
    assert first["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert first["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    config = read_config(tmp_path / "a")
    assert config.num_layers == 2
    assert config.quantization is not None
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    ranks = Ranks(tmp_path / "a")
    (sequence,) = sequences(1, seed=1)
    run(ranks, [(sequence, len(sequence.token_ids))])
    ranks.close()
    assert torch.cat(sequence.logits).isfinite().all()


def test_every_published_shape_can_be_described() -> None:
    billions = {"v3-0.7b": 0.7, "v2-lite": 15.7, "v3": 671.0, "v3-moe-layer": 11.5}
    for name, shape in random_checkpoint.SHAPES.items():
        config = parse_config(shape)
        sizes = random_checkpoint._tensors(config).values()
        assert sum(int(torch.Size(size).numel()) for size in sizes) / 1e9 == pytest.approx(billions[name], abs=0.06)


def test_large_checkpoints_are_sharded(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{number}", (number + 1, 10), torch.float32) for number in range(9)]
    write_checkpoint(tmp_path, specs, lambda spec: torch.full(spec.shape, float(spec.shape[0])), max_file_bytes=700)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    read = {name: value for path in tmp_path.glob("*.safetensors") for name, value in load_file(path).items()}
    assert {name: tuple(value.shape) for name, value in read.items()} == {spec.name: spec.shape for spec in specs}
    assert all(bool((value == len(value)).all()) for value in read.values())
    assert {name: entry.shape for name, entry in read_index(tmp_path).items()} == {s.name: s.shape for s in specs}


def test_layers_that_predict_further_tokens_are_skipped_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_deepseek(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, folder / "model.safetensors")
    with caplog.at_level(logging.INFO, logger="workers"):
        ranks = Ranks(folder)
    ranks.close()
    assert "layers 3 of the checkpoint predict further tokens" in caplog.text
    caplog.clear()
    log_skipped_layers(read_config(folder), ["model.layers.2.x", "lm_head.weight"])
    assert not caplog.text


def test_fused_experts_are_told_by_their_names() -> None:
    assert has_fused_experts(["model.layers.3.mlp.experts.gate_up_proj"])
    assert not has_fused_experts(["model.layers.3.mlp.experts.0.gate_proj.weight"])


def test_experts_may_share_their_values(tmp_path: Path) -> None:
    """Each has tensors of its own, so that it takes memory and time of its own."""
    tiny = json.loads((tiny_deepseek(tmp_path / "tiny") / "config.json").read_text())
    for fp8 in (False, True):
        folder = random_checkpoint.random_checkpoint(tmp_path / str(fp8), tiny, fp8=fp8, same_experts=True)
        tensors = load_file(folder / "model.safetensors")
        for name in ("gate_proj.weight", "down_proj.weight", *["up_proj.weight_scale_inv"] * fp8):
            experts = [tensors[f"model.layers.{layer}.mlp.experts.{n}.{name}"] for layer in (1, 2) for n in range(8)]
            raw = [expert.view(torch.uint8).tolist() for expert in experts]
            assert raw[0] == raw[1] == raw[7]
            assert raw[8] == raw[15]
            assert fp8 or raw[0] != raw[8]
