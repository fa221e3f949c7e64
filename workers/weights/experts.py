"""Reads single routed experts of a checkpoint, while a model that already holds others of them runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from workers.model.moe_sharding import expert_parameters
from workers.model.parameters import Parameter
from workers.model.shard import Shard
from workers.weights.index import TensorEntry
from workers.weights.load import WeightReader

__all__ = ["ExpertReader", "ExpertWeights"]

_NUM_THREADS = 2  # beside the step's own


class ExpertWeights(NamedTuple):
    """One expert of one layer; `gate_up` [2 * inner, hidden] holds gate above up."""

    layer: int
    expert: int
    gate_up: torch.Tensor
    down: torch.Tensor


class ExpertReader:
    """For the rank that `shard` describes."""

    def __init__(
        self, shard: Shard, folder: Path, index: Mapping[str, TensorEntry], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shard = shard
        self._folder = folder
        self._index = index
        self._dtype = dtype
        self.device = device

    def size_bytes(self, wanted: Sequence[tuple[int, int]]) -> int:
        """What these (layer, expert) pairs take in memory."""
        return sum(
            math.prod(parameter.shape) * self._dtype.itemsize
            for layer, expert in wanted
            for parameter in self._parameters(layer, expert)
        )

    def read(self, wanted: Sequence[tuple[int, int]]) -> Iterator[ExpertWeights]:
        """One (layer, expert) after the other. Raises CheckpointError where the checkpoint has changed."""
        parameters = {p.name: p for layer, expert in wanted for p in self._parameters(layer, expert)}
        with WeightReader(
            self._folder,
            parameters,
            self._dtype,
            index=self._index,
            quantization=self._shard.config.quantization,
            num_threads=_NUM_THREADS,
        ) as reader:
            for layer, expert in wanted:
                name = _name(layer, expert)
                gate_up, down = (reader.read(f"{name}.{part}.weight") for part in ("gate_up", "down"))
                yield ExpertWeights(layer, expert, gate_up.to(self.device), down.to(self.device))

    def _parameters(self, layer: int, expert: int) -> Iterator[Parameter]:
        module = f"model.layers.{layer}.mlp.experts"
        return expert_parameters(self._shard, _name(layer, expert), module, expert)


def _name(layer: int, expert: int) -> str:
    return f"layers.{layer}.mlp.experts.{expert}"
