"""Writes a checkpoint in another dtype or quantization, a few rows at a time, in files that loading needs no more of.

The result is in Hugging Face layout. FP8: e4m3 values with `NAME_scale_inv` per block of 128 x 128, as DeepSeek
publishes them. int8: values with `NAME_scale` [..., rows, 1] in fp32, quant_method "int8". Only projections are
quantized. A conversion that was cut off goes on behind the last file that it finished. `SHA256SUMS`, which the
`sha256sum` command reads too, is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.kernels.quantized import quantize_int8
from workers.model.config import read_config
from workers.model.other_config import NOTICE
from workers.model.parameters import Parameter, Piece
from workers.model.quantization import BlockQuantization
from workers.weights.fp8 import SCALE_SUFFIX, quantize, scale_shape
from workers.weights.index import CheckpointError, TensorEntry, read_index
from workers.weights.load import WeightReader
from workers.weights.scales import INT8_SCALE_SUFFIX
from workers.weights.write import DTYPE_NAMES, TensorSpec, split_files

__all__ = ["MANIFEST", "Conversion", "convert", "verify"]

MANIFEST = "SHA256SUMS"
_STATE = ".conversion.json"
_INDEX = "model.safetensors.index.json"
_BLOCK = BlockQuantization(128, 128)
_COPIED = (".json", ".txt", ".model", ".jinja", ".md", ".py", "")
_PART_BYTES = 64 << 20  # of fp32 values at a time
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Progress = Callable[[str, int, int], None]  # what is done; bytes done, bytes in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What is wanted. `dtype` is that of what is not quantized."""

    quantization: str = "none"  # "none", "fp8" or "int8"
    dtype: str = "bfloat16"
    max_shard_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if self.quantization not in ("none", "fp8", "int8"):
            raise ValueError(f"quantization must be none, fp8 or int8, not {self.quantization!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {self.dtype!r}")
        if self.max_shard_bytes < 1:
            raise ValueError("max_shard_size must be positive")


def convert(source: Path, target: Path, wanted: Conversion, progress: Progress) -> None:
    """Writes `source` converted to `target`, and reads it back against its checksums.

    Raises ValueError (CheckpointError) for what cannot be converted or does not read back as written.
    """
    if target.resolve() == source.resolve():
        raise ValueError("a checkpoint cannot be converted in place: name another folder")
    config = read_config(source)
    if wanted.quantization != "none" and not config.native:
        raise ValueError(f"quantization must be none for a {config.model_type} model, which {NOTICE}")
    quantization = config.quantization
    index = read_index(source)
    target.mkdir(parents=True, exist_ok=True)
    state = _State(target, _identity(index, wanted))
    specs = list(_specs(index, wanted))
    files = split_files(specs, wanted.max_shard_bytes)
    total, done = sum(spec.size_bytes for spec in specs), 0
    with _Values(source, index, wanted, quantization) as values:
        for name, part in files:
            size_bytes = sum(spec.size_bytes for spec in part)
            if not state.has(name):

                def heard(size: int, before: int = done) -> None:
                    progress("converting", before + size, total)

                state.add(name, _write(target / name, part, values, heard))
            done += size_bytes
            progress("converting", done, total)
    if len(files) > 1:
        weight_map = {spec.name: name for name, part in files for spec in part}
        _write_json(target / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _copy_others(source, target, wanted)
    sums = dict(state.sums)
    for path in sorted(target.iterdir()):
        if path.is_file() and path.name not in sums and path.name not in (_STATE, MANIFEST):
            sums[path.name] = _checksum(path)
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    _replace(target / MANIFEST, lines.encode())
    verify(target, progress)
    (target / _STATE).unlink()


def verify(folder: Path, progress: Progress) -> None:
    """Reads every file of the manifest. Raises CheckpointError naming the first that is missing or differs."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST}: was its conversion finished?") from error
    missing = [name for name in sums if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing[0]}")
    total, done = sum((folder / name).stat().st_size for name in sums), 0
    for name, digest in sums.items():
        if _checksum(folder / name) != digest:
            raise CheckpointError(f"{folder / name} differs from its checksum; convert again")
        done += (folder / name).stat().st_size
        progress("verifying", done, total)


class _State:
    """The files that are finished, with their checksums, kept beside them."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._path = folder / _STATE
        self._identity = identity
        self.sums: dict[str, str] = {}
        if self._path.exists():
            state = json.loads(self._path.read_text(encoding="utf-8"))
            if state["identity"] != identity:
                raise ValueError(f"{folder} holds a conversion of something else or to something else; remove it first")
            self.sums = state["sums"]
        elif any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty")
        else:
            self._save()

    def has(self, name: str) -> bool:
        return name in self.sums

    def add(self, name: str, digest: str) -> None:
        self.sums[name] = digest
        self._save()

    def _save(self) -> None:
        _replace(self._path, json.dumps({"identity": self._identity, "sums": self.sums}).encode())


def _identity(index: Mapping[str, TensorEntry], wanted: Conversion) -> str:
    """Changes with the options, and with the source's tensors and files."""
    digest = hashlib.sha256(repr(wanted).encode())
    for name, entry in sorted(index.items()):
        digest.update(repr((name, entry.dtype, entry.shape, entry.path.name, entry.offset)).encode())
    for path in sorted({entry.path for entry in index.values()}):
        digest.update(repr((path.name, path.stat().st_size, path.stat().st_mtime_ns)).encode())
    return digest.hexdigest()


def _is_projection(name: str, entry: TensorEntry) -> bool:
    if len(entry.shape) < 2 or name.endswith("eh_proj.weight"):
        return False
    fused = (".experts.gate_up_proj", ".experts.down_proj")
    return name.endswith(("_proj.weight", "_with_mqa.weight", *fused))


def _specs(index: Mapping[str, TensorEntry], wanted: Conversion) -> Iterator[TensorSpec]:
    for name, entry in index.items():
        if name.endswith(SCALE_SUFFIX) or (name.endswith(INT8_SCALE_SUFFIX) and _base(name) in index):
            continue
        if wanted.quantization == "none" or not _is_projection(name, entry):
            kept = name.endswith("e_score_correction_bias")  # what decides between experts stays exact
            yield TensorSpec(name, entry.shape, torch.float32 if kept else _DTYPES[wanted.dtype])
        elif wanted.quantization == "fp8":
            yield TensorSpec(name, entry.shape, torch.float8_e4m3fn)
            yield TensorSpec(name + SCALE_SUFFIX, scale_shape(entry.shape, _BLOCK), torch.float32)
        else:
            yield TensorSpec(name, entry.shape, torch.int8)
            yield TensorSpec(name + INT8_SCALE_SUFFIX, (*entry.shape[:-1], 1), torch.float32)


def _base(name: str) -> str:
    return name.removesuffix(SCALE_SUFFIX).removesuffix(INT8_SCALE_SUFFIX)


def _is_new_scale(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
    return _base(spec.name) != spec.name and _base(spec.name) in specs


class _Values:
    """The parts of one tensor after the other; a quantized tensor's scales follow it."""

    def __init__(
        self, folder: Path, index: Mapping[str, TensorEntry], wanted: Conversion, blocks: BlockQuantization | None
    ) -> None:
        self._index = index
        self._scales: dict[str, list[torch.Tensor]] = {}
        parameters: dict[str, Parameter] = {}
        self._specs = {spec.name: spec for spec in _specs(index, wanted)}
        for spec in self._specs.values():
            if not _is_new_scale(spec, self._specs):
                parameters |= {part.name: part for part in _parts(spec, index[spec.name])}
        dtype = _DTYPES[wanted.dtype]
        self._reader = WeightReader(folder, parameters, dtype, index=index, quantization=blocks)

    def __enter__(self) -> _Values:
        self._reader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(None, None, None)

    def __call__(self, spec: TensorSpec) -> Iterator[torch.Tensor]:
        if _is_new_scale(spec, self._specs):
            if spec.name not in self._scales:  # the values are in a file that was finished before
                for _ in self(self._specs[_base(spec.name)]):
                    pass
            yield from self._scales.pop(spec.name)
            return
        for parameter in _parts(spec, self._index[spec.name]):
            tensor = self._reader.read(parameter.name)
            assert isinstance(tensor, torch.Tensor)
            if spec.dtype == torch.float8_e4m3fn:
                tensor, scales = quantize(tensor, _BLOCK)
                self._scales.setdefault(spec.name + SCALE_SUFFIX, []).append(scales)
            elif spec.dtype == torch.int8:
                weight = quantize_int8(tensor)
                self._scales.setdefault(spec.name + INT8_SCALE_SUFFIX, []).append(weight.scales)
                tensor = weight.values
            yield tensor


def _parts(spec: TensorSpec, entry: TensorEntry) -> Iterator[Parameter]:
    """The tensor in pieces of whole rows, and where there are blocks of whole blocks of one matrix."""
    exact = spec.dtype in (torch.float32, torch.float8_e4m3fn, torch.int8)
    if len(entry.shape) == 1:
        piece = Piece(spec.name, entry.shape, (0, entry.shape[0]), None)
        yield Parameter(f"{spec.name}:0", entry.shape, (piece,), full_precision=exact)
        return
    height, width = entry.shape[-2:]
    num_rows = spec.size_bytes // spec.dtype.itemsize // width
    step = max(_BLOCK.rows, _PART_BYTES // (4 * width) // _BLOCK.rows * _BLOCK.rows)
    for matrix in range(0, num_rows, height):
        for first in range(matrix, matrix + height, step):
            stop = min(first + step, matrix + height)
            piece = Piece(spec.name, entry.shape, (first, stop), (0, width))
            yield Parameter(f"{spec.name}:{first}", (stop - first, width), (piece,), full_precision=exact)


def _write(
    path: Path,
    specs: list[TensorSpec],
    values: Callable[[TensorSpec], Iterator[torch.Tensor]],
    heard: Callable[[int], None],
) -> str:
    """Writes one file under another name, renames it once it is on the disk, and returns its checksum."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.size_bytes
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(path.name + ".partial")
    digest, done = hashlib.sha256(), 0
    with partial.open("wb") as file:
        for block in (struct.pack("<Q", len(encoded)), encoded):
            file.write(block)
            digest.update(block)
        for spec in specs:
            begun = done
            for tensor in values(spec):
                memory = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(memory)
                digest.update(memory)
                done += len(memory)
                heard(done)
            assert done - begun == spec.size_bytes, spec
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return digest.hexdigest()


def _copy_others(source: Path, target: Path, wanted: Conversion) -> None:
    """Everything that is not weights; config.json last, for without it the folder is no model."""
    own = ("config.json", _INDEX, MANIFEST, _STATE)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COPIED and path.name not in own and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config["dtype" if "dtype" in config else "torch_dtype"] = wanted.dtype
    if wanted.quantization == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK.rows, _BLOCK.columns],
        }
    elif wanted.quantization == "int8":
        config["quantization_config"] = {"quant_method": "int8", "strategy": "channel", "symmetric": True}
    _write_json(target / "config.json", config)


def _write_json(path: Path, value: object) -> None:
    _replace(path, (json.dumps(value, indent=2) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    """All of `content` or what was there before, whenever the machine stops."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
