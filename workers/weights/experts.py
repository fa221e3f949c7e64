"""Reads single routed experts of a checkpoint, while a model that already holds others of them runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from workers.kernels.quantized import Weight, move
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
    gate_up: Weight
    down: Weight


class ExpertReader:
    """For the rank that `shard` describes."""

    def __init__(
        self,
        shard: Shard,
        folder: Path,
        index: Mapping[str, TensorEntry],
        dtype: torch.dtype,
        device: torch.device,
        *,
        hold: str = "none",
    ) -> None:
        self._shard = shard
        self._folder = folder
        self._index = index
        self._dtype = dtype
        self._hold = hold
        self.device = device

    def size_bytes(self, wanted: Sequence[tuple[int, int]]) -> int:
        """What these (layer, expert) pairs take in memory."""
        with self._open(wanted) as reader:
            return reader.held_bytes

    def read(self, wanted: Sequence[tuple[int, int]]) -> Iterator[ExpertWeights]:
        """One (layer, expert) after the other. Raises CheckpointError where the checkpoint has changed."""
        with self._open(wanted) as reader:
            for layer, expert in wanted:
                name = _name(layer, expert)
                gate_up, down = (reader.read(f"{name}.{part}.weight") for part in ("gate_up", "down"))
                yield ExpertWeights(layer, expert, move(gate_up, self.device), move(down, self.device))

    def _open(self, wanted: Sequence[tuple[int, int]]) -> WeightReader:
        return WeightReader(
            self._folder,
            {p.name: p for layer, expert in wanted for p in self._parameters(layer, expert)},
            self._dtype,
            index=self._index,
            quantization=self._shard.config.quantization,
            hold=self._hold,
            num_threads=_NUM_THREADS,
        )

    def _parameters(self, layer: int, expert: int) -> Iterator[Parameter]:
        module = f"model.layers.{layer}.mlp.experts"
        return expert_parameters(self._shard, _name(layer, expert), module, expert)


def _name(layer: int, expert: int) -> str:
    return f"layers.{layer}.mlp.experts.{expert}"
