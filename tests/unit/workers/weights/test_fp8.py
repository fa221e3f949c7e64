"""FP8 blocks: values, slices of them, and whole models against transformers on the same values in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_checkpoint
from tests.unit.workers.model.stepping import TOLERANCE, distance, expected_logits, run, sequences
from tests.unit.workers.ranks import Ranks
from workers.model.parameters import Parameter, Piece
from workers.model.quantization import BlockQuantization
from workers.weights.fp8 import quantize, scale_shape
from workers.weights.index import CheckpointError
from workers.weights.load import WeightReader

_BLOCK = BlockQuantization(128, 128)
_SCALES = ("float32", "bfloat16", "float8_e8m0fnu", "uint8")


def _dequantized(values: torch.Tensor, scales: torch.Tensor, block: BlockQuantization) -> torch.Tensor:
    """By torch's own conversion, each scale repeated over its block."""
    scales = scales.repeat_interleave(block.rows, -2).repeat_interleave(block.columns, -1)
    return values.float() * scales[..., : values.shape[-2], : values.shape[-1]]


def _stored(scales: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "uint8":
        return scales.to(torch.float8_e8m0fnu).view(torch.uint8)
    return scales.to(getattr(torch, kind))


def _reader(folder: Path, parameter: Parameter, dtype: torch.dtype = torch.float32) -> WeightReader:
    return WeightReader(folder, {"p": parameter}, dtype, quantization=_BLOCK)


def _dense(reader: WeightReader) -> torch.Tensor:
    tensor = reader.read("p")
    assert isinstance(tensor, torch.Tensor)
    return tensor


def test_every_value_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    values = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
    values = values.view(torch.float8_e4m3fn).view(2, 127)
    scales = torch.tensor([[0.37]])
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    parameter = Parameter("p", (2, 127), (Piece("w", (2, 127), (0, 2), (0, 127)),))
    with _reader(tmp_path, parameter) as reader:
        assert torch.equal(_dense(reader), values.float() * 0.37)


@pytest.mark.parametrize("kind", _SCALES)
@pytest.mark.parametrize("shape", [(300, 400), (3, 150, 260)])
def test_any_slice(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values, scales = quantize(weight, _BLOCK, exponents_only=kind != "float32")
    assert scales.shape == scale_shape(shape, _BLOCK)
    save_file({"w": values, "w_scale_inv": _stored(scales, kind)}, tmp_path / "model.safetensors")
    whole = _dequantized(values, scales, _BLOCK).view(-1, shape[-1])
    num_rows, width = whole.shape
    # e4m3 keeps three bits of mantissa, and below 2^-6 of the block's largest scale step fewer
    torch.testing.assert_close(whole.view(shape), weight, rtol=0.07, atol=0.02)
    for rows in ((0, num_rows), (5, 9), (120, 131), (149, 151), (127, num_rows - 1), (num_rows - 1, num_rows)):
        for columns in ((0, width), (100, 130), (128, 256), (width - 3, width)):
            piece = Piece("w", shape, rows, columns)
            parameter = Parameter("p", (rows[1] - rows[0] + 2, columns[1] - columns[0]), (piece,))
            for dtype in (torch.float32, torch.bfloat16):
                with _reader(tmp_path, parameter, dtype) as reader:
                    got = _dense(reader)
                    assert reader.bytes_read == reader.bytes_total
                    assert reader.bytes_read < values.numel() + scales.numel() * 4 or rows[1] - rows[0] == num_rows
                assert torch.equal(got[:-2], whole[slice(*rows), slice(*columns)].to(dtype))
                assert not got[-2:].any()


@pytest.mark.parametrize("problem", ["no quantization_config", "without its scales", "are called for"])
def test_what_does_not_fit_is_refused(tmp_path: Path, problem: str) -> None:
    values, scales = quantize(torch.ones(300, 300), _BLOCK)
    tensors = {"w": values, "w_scale_inv": scales}
    quantization: BlockQuantization | None = _BLOCK
    if problem == "no quantization_config":
        quantization, problem = None, "quantization_config says nothing"
    elif problem == "without its scales":
        del tensors["w_scale_inv"]
    else:
        tensors["w_scale_inv"] = scales[:2].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    parameter = Parameter("p", (300, 300), (Piece("w", (300, 300), (0, 300), (0, 300)),))
    with pytest.raises(CheckpointError, match=problem):
        WeightReader(tmp_path, {"p": parameter}, torch.float32, quantization=quantization)


def _write_fp8(source: Path, target: Path, block: BlockQuantization, kind: str) -> dict[str, torch.Tensor]:
    """Quantizes a checkpoint's projections; returns all its tensors as they then read, in fp32."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    stored, read = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        stored[name] = read[name] = weight
        if "_proj" in name and not name.endswith(".bias"):
            values, scales = quantize(weight, block, exponents_only=kind != "float32")
            stored[name], stored[name + "_scale_inv"] = values, _stored(scales, kind)
            read[name] = _dequantized(values, scales, block)
    save_file(stored, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [block.rows, block.columns],
        **({} if kind == "float32" else {"scale_fmt": "ue8m0"}),
    }
    (target / "config.json").write_text(json.dumps(config))
    return read


@pytest.mark.parametrize(("kind", "fused"), [("float32", False), ("float8_e8m0fnu", False), ("float32", True)])
def test_a_model_in_fp8_equals_transformers_on_its_values(tmp_path: Path, kind: str, fused: bool) -> None:
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=203,
        hidden_size=60,
        intermediate_size=101,
        moe_intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=26,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        num_mtp_layers=0,
    )
    write_checkpoint(tmp_path / "plain", config, fused_experts=fused)
    # heads of 20, 22 and 10 rows or columns: a rank's slices begin inside blocks
    read = _write_fp8(tmp_path / "plain", tmp_path / "fp8", BlockQuantization(16, 24), kind)
    (tmp_path / "read").mkdir()
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "read")
    save_file(read, tmp_path / "read" / "model.safetensors", metadata={"format": "pt"})
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "read", dtype=torch.float32)
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    for tensor in (1, 2, 3):
        for held in ("none", "fp8"):
            ranks = Ranks(tmp_path / "fp8", tensor=tensor, block_size=4, quantization=held)
            (sequence,) = sequences(1, seed=tensor)
            for count in (40, 1, 20):
                run(ranks, [(sequence, count)])
            ranks.close()
            assert distance(sequence, expected_logits(model, sequence)) <= TOLERANCE
