"""Writes a GGUF out as a folder in Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf

from cluster.models import gguf_tokenizer
from cluster.models.gguf_weights import Tensor, fields_of, hf_config, hf_tensors

__all__ = ["convert"]


def convert(source: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    """`progress(tensors done, tensors in all)`. Raises ValueError for a GGUF of another kind than ours."""
    reader = gguf.GGUFReader(source)
    fields = fields_of(reader)
    num_tensors = len(reader.tensors)
    tensors: list[Tensor] = []
    for done, tensor in enumerate(hf_tensors(reader, fields), start=1):
        tensors.append(tensor)
        progress(done, num_tensors)
    _write_safetensors(folder / "model.safetensors", tensors)
    _write(folder / "config.json", hf_config(fields, tied=all(name != "lm_head.weight" for name, _, _ in tensors)))
    _write(folder / "generation_config.json", gguf_tokenizer.generation_config(fields))
    _write(folder / "tokenizer_config.json", gguf_tokenizer.tokenizer_config(fields))
    gguf_tokenizer.tokenizer(fields).save(str(folder / "tokenizer.json"))


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, tensors: list[Tensor]) -> None:
    """By hand, because numpy has no bfloat16: header length, header padded to eight bytes, values end to end."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, data in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors:
            file.write(data)
