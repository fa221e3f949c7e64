"""Writes a checkpoint tensor by tensor, so that it never has to fit in memory.

safetensors wants a file's header, with every tensor's place, before its data: shapes and types are known ahead, and
values are asked for one tensor after the other.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["DTYPE_NAMES", "TensorSpec", "split_files", "write_checkpoint"]

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        num_items = 1
        for size in self.shape:
            num_items *= size
        return num_items * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    specs: Sequence[TensorSpec],
    make: Callable[[TensorSpec], torch.Tensor],
    *,
    max_file_bytes: int = 4 << 30,
) -> None:
    """Writes `specs` in their order, in one file or in several with an index; `make` gives the values of one."""
    files = split_files(specs, max_file_bytes)
    total = sum(spec.size_bytes for spec in specs)
    weight_map: dict[str, str] = {}
    for name, part in files:
        _write_file(folder / name, part, make)
        weight_map |= {spec.name: name for spec in part}
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split_files(specs: Sequence[TensorSpec], max_file_bytes: int) -> list[tuple[str, list[TensorSpec]]]:
    """The files of a checkpoint by name, each with what it holds."""
    files: list[list[TensorSpec]] = [[]]
    size_bytes = 0
    for spec in specs:
        if files[-1] and size_bytes + spec.size_bytes > max_file_bytes:
            files.append([])
            size_bytes = 0
        files[-1].append(spec)
        size_bytes += spec.size_bytes
    if len(files) == 1:
        return [("model.safetensors", files[0])]
    return [(f"model-{n:05d}-of-{len(files):05d}.safetensors", part) for n, part in enumerate(files, start=1)]


def _write_file(path: Path, specs: Sequence[TensorSpec], make: Callable[[TensorSpec], torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.size_bytes
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begins at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for spec in specs:
            tensor = make(spec)
            assert tuple(tensor.shape) == spec.shape, spec
            assert tensor.dtype == spec.dtype, spec
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
