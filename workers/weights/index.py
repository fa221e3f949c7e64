"""Where each tensor of a checkpoint lies: the headers of its safetensors files, read and checked, and no data.

Format: eight bytes of little-endian header size, a JSON header, the data
(https://huggingface.co/docs/safetensors). A sharded checkpoint names its files in `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ITEM_SIZES", "CheckpointError", "TensorEntry", "read_index"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100_000_000
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1}


class CheckpointError(ValueError):
    """A model folder's weights cannot be used; the message says what to do, in one line."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's bytes: `size_bytes` at `offset` of `path`, in safetensors' name of its dtype."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_index(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of the checkpoint in `folder` by name.

    Raises CheckpointError for weights that are missing, truncated, malformed or pickled.
    """
    entries: dict[str, TensorEntry] = {}
    for path in _files(folder):
        entries.update(_read_header(path))
    return entries


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        return _shards(index)
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({pickled[0]}), which are not read because loading them can run any "
            "code; save the model as safetensors (transformers' save_pretrained does)"
        )
    raise CheckpointError(f"{folder} has no weights: expected {_SINGLE} or {_INDEX}")


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
    for name in names:
        if not isinstance(name, str) or name != Path(name).name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}; "
            "fetch the model again"
        )
    return [index.parent / name for name in names]


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            file_bytes = path.stat().st_size
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file: its header is malformed")
            if 8 + header_bytes > file_bytes:
                raise _truncated(path, 8 + header_bytes, file_bytes)
            header = json.loads(file.read(header_bytes))
        entries = dict(_entries(path, header, 8 + header_bytes))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is malformed") from error
    end = max((entry.offset + entry.size_bytes for entry in entries.values()), default=8 + header_bytes)
    if end > file_bytes:
        raise _truncated(path, end, file_bytes)
    return entries


def _entries(path: Path, header: dict[str, dict[str, list[int]]], data: int) -> Iterator[tuple[str, TensorEntry]]:
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        start, stop = fields["data_offsets"]
        entry = TensorEntry(path, str(fields["dtype"]), tuple(map(int, fields["shape"])), data + start, stop - start)
        num_items = 1
        for size in entry.shape:
            num_items *= size
        item_size = ITEM_SIZES.get(entry.dtype)
        if start < 0 or stop < start or (item_size is not None and entry.size_bytes != num_items * item_size):
            raise CheckpointError(f"{path} is malformed: the bytes of {name} do not fit its shape")
        yield name, entry


def _truncated(path: Path, expected: int, found: int) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: it has {found} of {expected} bytes; fetch the model again")
