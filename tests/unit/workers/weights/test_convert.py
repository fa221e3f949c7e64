"""Converted checkpoints: what they hold, what is left of a conversion that was cut off, and that damage is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.workers.model.stepping import TOLERANCE, run, sequences
from tests.unit.workers.ranks import Ranks
from workers.kernels.quantized import quantize_int8
from workers.model.quantization import BlockQuantization
from workers.weights.convert import MANIFEST, Conversion, convert, verify
from workers.weights.fp8 import quantize
from workers.weights.index import CheckpointError
from workers.weights.random_checkpoint import SHAPES, random_checkpoint

_SHAPE = SHAPES["v3-0.7b"] | {
    "vocab_size": 96,
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


def _quiet(phase: str, done: int, total: int) -> None:
    assert 0 <= done <= total, phase


def _load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("source"), _SHAPE, dtype="float32")


def test_dtype(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path, Conversion(dtype="bfloat16", max_shard_bytes=300_000), _quiet)
    before, after = _load(source), _load(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        exact = name.endswith("e_score_correction_bias")
        assert torch.equal(after[name], tensor if exact else tensor.bfloat16()), name
    assert sorted(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == sorted(after)
    assert not list(tmp_path.glob(".*")) + list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_quantized_and_back(source: Path, tmp_path: Path, quantization: str) -> None:
    small, back = tmp_path / "small", tmp_path / "back"
    convert(source, small, Conversion(quantization=quantization, dtype="float32"), _quiet)
    convert(small, back, Conversion(dtype="float32"), _quiet)
    before, stored, after = _load(source), _load(small), _load(back)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if "_proj" not in name:
            assert torch.equal(after[name], tensor)
        elif quantization == "int8":
            weight = quantize_int8(tensor)
            assert torch.equal(stored[name], weight.values)
            assert torch.equal(after[name], weight.values.float() * weight.scales[:, None])
        else:
            values, scales = quantize(tensor, BlockQuantization(128, 128))
            assert torch.equal(stored[name + "_scale_inv"], scales)
            wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(tensor), : tensor.shape[1]]
            torch.testing.assert_close(after[name], values.float() * wide, rtol=1e-6, atol=1e-9)
    again = tmp_path / "again"
    convert(small, again, Conversion(quantization="int8", dtype="float32"), _quiet)
    if quantization == "int8":
        assert all(torch.equal(tensor, _load(again)[name]) for name, tensor in stored.items() if "_scale" not in name)


class _CutOffError(Exception):
    pass


@pytest.mark.parametrize("share", [0.5, 0.52, 0.54])
def test_goes_on_behind_the_last_finished_file(source: Path, tmp_path: Path, share: float) -> None:
    wanted = Conversion(quantization="int8", max_shard_bytes=1)  # values and scales in files of their own

    def cut(phase: str, done: int, total: int) -> None:
        if done > total * share:
            raise _CutOffError

    with pytest.raises(_CutOffError):
        convert(source, tmp_path, wanted, cut)
    assert not (tmp_path / "config.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert finished
    with pytest.raises(ValueError, match="something else"):
        convert(source, tmp_path, Conversion(quantization="fp8", max_shard_bytes=1), _quiet)
    convert(source, tmp_path, wanted, _quiet)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list(tmp_path.glob("*.safetensors"))) > len(finished)
    whole = tmp_path / "whole"
    convert(source, whole, wanted, _quiet)
    assert (whole / MANIFEST).read_text() == (tmp_path / MANIFEST).read_text()


def test_damage_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was its conversion finished"):
        verify(tmp_path, _quiet)
    convert(source, tmp_path, Conversion(), _quiet)
    verify(tmp_path, _quiet)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors differs"):
        verify(tmp_path, _quiet)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        verify(tmp_path, _quiet)


def test_refuses_to_overwrite(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in place"):
        convert(source, source, Conversion(), _quiet)
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        convert(source, tmp_path, Conversion(), _quiet)


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_what_is_written_runs_as_its_values_do(source: Path, tmp_path: Path, quantization: str) -> None:
    small, back = tmp_path / "small", tmp_path / "back"
    convert(source, small, Conversion(quantization=quantization, dtype="float32"), _quiet)
    convert(small, back, Conversion(dtype="float32"), _quiet)
    logits = []
    for folder, held in ((back, "none"), (small, "none"), (small, quantization)):
        ranks = Ranks(folder, quantization=held)
        (sequence,) = sequences(1, seed=3)
        sequence.token_ids = [token % 96 for token in sequence.token_ids]
        run(ranks, [(sequence, len(sequence.token_ids))])
        ranks.close()
        logits.append(sequence.logits[0])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=TOLERANCE)


def test_what_runs_through_transformers_is_not_quantized(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    raw = json.loads((source / "config.json").read_text()) | {"model_type": "mistral", "architectures": None}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="quantization must be none for a mistral model"):
        convert(folder, tmp_path / "target", Conversion(quantization="int8"), _quiet)
    assert not (tmp_path / "target").exists()
