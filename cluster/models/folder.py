"""Whether a folder can be served, found out before any process is started: from config.json, the index and the
headers of the weight files, without reading a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.models.errors import ModelError

__all__ = ["ModelFacts", "inspect"]

# model_type: what the engine runs natively.
SERVED = ("llama", "qwen2", "qwen3")
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What placing an engine needs to know of a model."""

    architecture: str
    dtype: str
    max_position_embeddings: int
    num_attention_heads: int
    num_key_value_heads: int
    weight_bytes: int


def inspect(folder: Path) -> ModelFacts:
    """Raises ModelError naming the file at fault."""
    config = _read_json(folder / "config.json", f"{folder} is not a model folder: it has no config.json")
    architecture = config.get("model_type")
    if architecture not in SERVED:
        raise ModelError(
            f"{folder / 'config.json'}: model_type {architecture!r} is not served; known are {', '.join(SERVED)}"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json")
    num_heads = _number(config, "num_attention_heads", folder)
    return ModelFacts(
        architecture=architecture,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        max_position_embeddings=_number(config, "max_position_embeddings", folder),
        num_attention_heads=num_heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or num_heads),
        weight_bytes=sum(_check_weights(path) for path in _weight_files(folder)),
    )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{folder / _INDEX} has no weight_map")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of {len(paths)} weight files are missing: {', '.join(missing)}")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if paths:
        return paths
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when read and are refused: "
            "convert them to safetensors"
        )
    raise ModelError(f"{folder} holds no *.safetensors")


def _check_weights(path: Path) -> int:
    """The bytes of the tensors in `path`, whose length must be what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{path} is not a safetensors file, or is cut short")
        try:
            header = json.loads(file.read(header_bytes))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelError(f"{path} is not a safetensors file: its header cannot be read") from None
    expected = 8 + header_bytes + max(ends, default=0)
    if size != expected:
        kind = "cut short" if size < expected else "too long"
        raise ModelError(f"{path} is {kind}: {size} bytes where its header says {expected}")
    return max(ends, default=0)


def _number(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{folder / 'config.json'}: {key} must be a positive number, not {value!r}")
    return value


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(missing) from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ModelError(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return content
