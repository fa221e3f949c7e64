"""Tries placements of experts on recorded routing, without an engine.

A placement is made from the first part of a recording and judged on the rest: what it knows of the load is what it
would have known then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scheduler.experts import ExpertPlacement, balanced, contiguous, rank_loads, step_imbalance

__all__ = ["Outcome", "Recording", "compare", "read_recording"]


@dataclass(frozen=True, slots=True)
class Recording:
    """`parts[n][layer, expert]` counts the choices of the n-th run of tokens; `layers` are the model's numbers."""

    layers: tuple[int, ...]
    parts: tuple[NDArray[np.int64], ...]

    @property
    def num_choices(self) -> int:
        return int(sum(part.sum() for part in self.parts))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What each rank would have carried over the judged part, in expert choices over all layers.

    `imbalance` is of a step: in every layer all ranks wait for the most loaded.
    """

    name: str
    carried: tuple[float, ...]
    imbalance: float


def read_recording(folder: Path, *, tokens_per_part: int = 256) -> Recording:
    """The files that `inference.record_routing` made. Raises ValueError where there are none, or they do not match."""
    layers: tuple[int, ...] | None = None
    parts: list[NDArray[np.int64]] = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            experts, found, num_experts = file["experts"], tuple(map(int, file["layers"])), int(file["num_experts"])
        if layers not in (None, found) or (parts and parts[0].shape[1] != num_experts):
            raise ValueError(f"{path.name} is of another model than the files before it")
        layers = found
        for start in range(0, experts.shape[1], tokens_per_part):
            part = experts[:, start : start + tokens_per_part].reshape(len(found), -1)
            parts.append(np.stack([np.bincount(chosen, minlength=num_experts) for chosen in part]))
    if layers is None:
        raise ValueError(f"{folder} holds no recorded routing (*.npz)")
    return Recording(layers, tuple(parts))


def compare(
    recording: Recording, num_ranks: int, *, redundant: int = 0, num_hosts: int = 1, train_share: float = 0.5
) -> tuple[Outcome, ...]:
    """Neighbours together, balanced by the first `train_share` of the recording, and balanced by what is judged:
    the last knows the future and is the bound. Raises ValueError for what cannot be placed or split."""
    num_experts = recording.parts[0].shape[1]
    if num_ranks > num_experts:
        raise ValueError(
            f"{num_experts} experts cannot be spread over {num_ranks} ranks; {num_experts} or less would do"
        )
    if redundant and (num_experts + redundant) % num_ranks:
        fitting = (num_experts + redundant) // num_ranks * num_ranks + num_ranks - num_experts
        raise ValueError(
            f"{num_experts} experts and {redundant} redundant ones do not divide by {num_ranks} ranks; {fitting} "
            "redundant ones would"
        )
    split = round(len(recording.parts) * train_share)
    if not 0 < split < len(recording.parts):
        raise ValueError(
            f"a recording of {len(recording.parts)} parts cannot be split at {train_share:.0%}; record more tokens"
        )
    known, judged = recording.parts[:split], recording.parts[split:]

    def even_out(parts: Sequence[NDArray[np.int64]]) -> list[ExpertPlacement]:
        loads: list[list[float]] = np.sum(parts, axis=0).tolist()
        return [balanced(layer, num_ranks, redundant=redundant, num_hosts=num_hosts) for layer in loads]

    ways: dict[str, Callable[[], list[ExpertPlacement]]] = {
        "contiguous": lambda: [contiguous(num_experts, num_ranks)] * len(recording.layers),
        "balanced": lambda: even_out(known),
        "balanced, knowing the future": lambda: even_out(judged),
    }
    return tuple(_judge(name, place(), judged) for name, place in ways.items())


def _judge(name: str, placements: Sequence[ExpertPlacement], judged: Sequence[NDArray[np.int64]]) -> Outcome:
    loads: list[list[float]] = np.sum(judged, axis=0).tolist()
    carried = [rank_loads(place, layer) for place, layer in zip(placements, loads, strict=True)]
    return Outcome(name, tuple(sum(rank) for rank in zip(*carried, strict=True)), step_imbalance(carried))
