"""Whether a folder can be served, found out before any process is started: from config.json, the index and the
headers of the weight files, without reading a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.models.errors import ModelError
from workers.model.config import ModelConfig, read_config
from workers.weights.index import read_index

__all__ = ["ModelFacts", "inspect", "survey"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What placing an engine needs to know of a model; `weight_bytes` as they lie on disk."""

    config: ModelConfig
    weight_bytes: int


def inspect(folder: Path) -> ModelFacts:
    """Raises ModelError naming the file at fault."""
    try:
        config = read_config(folder)
        weight_bytes = sum(entry.size_bytes for entry in read_index(folder).values())
    except ValueError as error:
        raise ModelError(str(error)) from None
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json")
    return ModelFacts(config=config, weight_bytes=weight_bytes)


def survey(folder: Path) -> ModelFacts:
    """The same of a folder that need not hold the weights: what planning needs. Raises ModelError."""
    try:
        config = read_config(folder)
    except ValueError as error:
        raise ModelError(str(error)) from None
    try:
        weight_bytes = sum(entry.size_bytes for entry in read_index(folder).values())
    except ValueError as error:
        if not config.native:  # its sizes are known from the weights alone
            raise ModelError(str(error)) from None
        weight_bytes = 0
    return ModelFacts(config=config, weight_bytes=weight_bytes)
