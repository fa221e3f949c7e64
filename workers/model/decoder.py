"""The decoder: what comes in, layers of attention and MLP, what goes out (`ends.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from workers.cache import KVCache, LayerCache
from workers.model.ends import Entrance, Exit
from workers.model.moe import MoE, RoutingRecorder
from workers.model.rope import RotaryTable
from workers.step import StepTensors

__all__ = ["Attention", "Decoder", "DecoderLayer"]


class Attention(Protocol):
    """A layer's attention block, residual included; what it keeps of a token is its own affair."""

    @property
    def cache_row(self) -> int:
        """Elements that the cache keeps per token."""
        ...

    @property
    def ragged(self) -> bool:
        """Whether it goes by each decoding sequence's length (`Kernels.ragged`)."""
        ...

    def __call__(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], step: StepTensors, cache: LayerCache
    ) -> torch.Tensor: ...


class DecoderLayer:
    """An attention block and an MLP block; `mlp` is any x [T, hidden] to x [T, hidden] with its residual sum, both
    in fp32."""

    __slots__ = ("attention", "mlp")

    def __init__(self, attention: Attention, mlp: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.attention = attention
        self.mlp = mlp


class Decoder:
    """A whole model, or one rank's part of it. `mixtures` are its layers with routed experts, by number."""

    def __init__(
        self, *, entrance: Entrance, layers: Mapping[int, DecoderLayer], exit_: Exit, rotary: RotaryTable
    ) -> None:
        """`layers` are by number, in order."""
        self._entrance = entrance
        self._layers = tuple(layers.values())
        self._exit = exit_
        self._rotary = rotary
        self.mixtures = {number: layer.mlp for number, layer in layers.items() if isinstance(layer.mlp, MoE)}

    @property
    def cache_rows(self) -> list[int]:
        """Elements per token that each layer keeps."""
        return [layer.attention.cache_row for layer in self._layers]

    @property
    def ragged(self) -> bool:
        """Whether decoding sequences of any lengths may form one group without a mask."""
        return all(layer.attention.ragged for layer in self._layers)

    def record_routing(self, recorder: RoutingRecorder | None) -> None:
        """Tells `recorder` of every expert choice from the next step on; None stops that."""
        for mixture in self.mixtures.values():
            mixture.recorder = recorder

    def forward(self, step: StepTensors, cache: KVCache) -> torch.Tensor | None:
        """Runs a step and fills the cache's slots.

        Returns logits [rows that need them, vocabulary] at index 0 of the last stage's tensor axis and None at the
        others, or logits of no rows where none need them.
        """
        x = self._entrance(step)
        rotation = self._rotary.rows(step.positions)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            x = layer.mlp(layer.attention(x, rotation, step, layer_cache))
        return self._exit(x, step)

    def keep_step(self, nothing: torch.Tensor) -> None:
        """Serves other ranks, which have tokens, while this one has none."""
        for mixture in self.mixtures.values():
            mixture.keep_step(nothing)
        self._exit.keep_step(nothing)
