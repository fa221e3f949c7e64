"""Reading parts of tensors: exactly those bytes, in the wanted dtype, and clear words for what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.model.parameters import Parameter, Piece
from workers.weights.index import CheckpointError
from workers.weights.load import WeightReader

A = torch.randn(70, 40, generator=torch.Generator().manual_seed(1))
B = torch.randn(30, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
C = torch.randn(12, generator=torch.Generator().manual_seed(3)).half()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": A, "b": B, "c": C, "ids": torch.zeros(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    return tmp_path


def _reader(
    folder: Path, *parameters: Parameter, dtype: torch.dtype = torch.float32, **options: object
) -> WeightReader:
    return WeightReader(folder, {p.name: p for p in parameters}, dtype, **options)  # type: ignore[arg-type]


def _read(reader: WeightReader, name: str) -> torch.Tensor:
    value = reader.read(name)
    assert isinstance(value, torch.Tensor)
    return value


STACKED = Parameter(
    "stacked", (40, 40), (Piece("a", (70, 40), (10, 30), (0, 40)), Piece("b", (30, 40), (3, 18), (0, 40)))
)
COLUMNS = Parameter("columns", (70, 7), (Piece("a", (70, 40), (0, 70), (11, 18)),))
VECTOR = Parameter("vector", (4,), (Piece("c", (12,), (5, 9), None),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_are_stacked_converted_and_filled_up(folder: Path, dtype: torch.dtype) -> None:
    with _reader(folder, STACKED, COLUMNS, VECTOR, dtype=dtype) as reader:
        expected = torch.cat((A[10:30].to(dtype), B[3:18].to(dtype), torch.zeros(5, 40, dtype=dtype)))
        assert torch.equal(_read(reader, "stacked"), expected)
        assert torch.equal(_read(reader, "columns"), A[:, 11:18].to(dtype))
        assert torch.equal(_read(reader, "vector"), C[5:9].to(dtype))


def test_only_the_bytes_of_the_slices_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    read = []
    preadv = os.preadv

    def counting(file: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(file, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    heard: list[tuple[int, int]] = []
    with _reader(folder, STACKED, COLUMNS, VECTOR, progress=lambda *state: heard.append(state)) as reader:
        for name in ("stacked", "columns", "vector"):
            reader.read(name)
        expected = 20 * 40 * 4 + 15 * 40 * 2 + 70 * 7 * 4 + 4 * 2
        assert sum(read) == reader.bytes_read == reader.bytes_total == expected
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1] == (expected, expected)


def test_large_tensors_are_read_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.weights.load._CHUNK_BYTES", 500)
    heard: list[tuple[int, int]] = []
    with _reader(folder, STACKED, COLUMNS, progress=lambda *state: heard.append(state)) as reader:
        assert torch.equal(_read(reader, "stacked")[:20], A[10:30])
        assert torch.equal(_read(reader, "columns"), A[:, 11:18])
    assert len(heard) > 10


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("missing", (1,), (0, 1), None), "lacks the tensor missing"),
        (Piece("a", (71, 40), (0, 1), (0, 40)), "a has shape [70, 40] where config.json calls for [71, 40]"),
        (Piece("c", (12, 1), (0, 1), (0, 1)), "c has shape [12] where config.json calls for [12, 1]"),
        (Piece("ids", (3,), (0, 3), None), "ids is stored as I64, which is not supported"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_read(folder: Path, piece: Piece, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        _reader(folder, Parameter("wanted", piece.shape, (piece,)))
    assert message in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    with _reader(folder, COLUMNS) as reader:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(CheckpointError, match="is truncated"):
            reader.read("columns")
