"""What is said of a folder whose weights cannot be used."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.weights.index import CheckpointError, read_index

INDEX = "model.safetensors.index.json"


def _save(path: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, path)


def _refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    _save(path, a=torch.arange(6, dtype=torch.float16).view(2, 3), b=torch.ones(1))
    entries = read_index(tmp_path)
    assert set(entries) == {"a", "b"}
    entry = entries["a"]
    assert (entry.dtype, entry.shape, entry.size_bytes) == ("F16", (2, 3), 12)
    raw = path.read_bytes()[entry.offset : entry.offset + 12]
    assert torch.frombuffer(bytearray(raw), dtype=torch.float16).tolist() == [0, 1, 2, 3, 4, 5]


def test_shards(tmp_path: Path) -> None:
    _save(tmp_path / "x.safetensors", a=torch.ones(2))
    _save(tmp_path / "y.safetensors", b=torch.ones(3))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    assert {name: entry.path.name for name, entry in read_index(tmp_path).items()} == {
        "a": "x.safetensors",
        "b": "y.safetensors",
    }
    (tmp_path / "y.safetensors").unlink()
    assert "lacks 1 of 2 weight files, first y.safetensors" in _refusal(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_an_index_cannot_lead_elsewhere(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "is not a file beside it" in _refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', "\x00"])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    assert "is not a safetensors index" in _refusal(tmp_path)


def test_nothing_and_pickles(tmp_path: Path) -> None:
    assert "has no weights: expected model.safetensors" in _refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = _refusal(tmp_path)
    assert "pickled weights only (pytorch_model.bin)" in message
    assert "save the model as safetensors" in message


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    _save(path, a=torch.ones(100))
    path.write_bytes(path.read_bytes()[:keep])
    assert ("malformed" if 0 <= keep < 8 else "is truncated") in _refusal(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
    ],
)
def test_a_malformed_header(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 8)
    assert "malformed" in _refusal(tmp_path)


def test_a_header_larger_than_any(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**60))
    assert "malformed" in _refusal(tmp_path)
