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

__all__ = ["Outcome", "Recording", "StageRecording", "compare", "read_recording"]


_Loads = list[list[float]]  # by layer and expert


@dataclass(frozen=True, slots=True)
class StageRecording:
    """`parts[n][layer, expert]` counts the choices of the n-th run of tokens; `layers` are the model's numbers."""

    layers: tuple[int, ...]
    parts: tuple[NDArray[np.int64], ...]

    def split(self, share: float) -> tuple[Sequence[NDArray[np.int64]], Sequence[NDArray[np.int64]]]:
        """The first `share` of it, and the rest; neither is empty. Raises ValueError."""
        end = round(len(self.parts) * share)
        if not 0 < end < len(self.parts):
            raise ValueError(
                f"a recording of {len(self.parts)} parts cannot be split at {share:.0%}; record more tokens"
            )
        return self.parts[:end], self.parts[end:]


@dataclass(frozen=True, slots=True)
class Recording:
    """One stage, or those of a pipeline in their order: each wrote its own layers' choices."""

    stages: tuple[StageRecording, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for stage in self.stages for layer in stage.layers)

    @property
    def num_choices(self) -> int:
        return int(sum(part.sum() for stage in self.stages for part in stage.parts))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What each rank of each stage would have carried over the judged part, in expert choices over the stage's layers.

    `imbalance` is of a step: in every layer all ranks wait for the most loaded.
    """

    name: str
    carried: tuple[tuple[float, ...], ...]
    imbalance: float


def read_recording(folder: Path, *, tokens_per_part: int = 256) -> Recording:
    """The files that `inference.record_routing` made. Raises ValueError where there are none, or they do not match."""
    stages: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}
    sizes: set[int] = set()
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            experts, layers, num_experts = file["experts"], tuple(map(int, file["layers"])), int(file["num_experts"])
        sizes.add(num_experts)
        others = {layer for stage in stages if stage != layers for layer in stage}
        if len(sizes) > 1 or others & set(layers):
            raise ValueError(f"{path.name} is of another model or plan than the files before it")
        parts = stages.setdefault(layers, [])
        for start in range(0, experts.shape[1], tokens_per_part):
            part = experts[:, start : start + tokens_per_part].reshape(len(layers), -1)
            parts.append(np.stack([np.bincount(chosen, minlength=num_experts) for chosen in part]))
    if not stages:
        raise ValueError(f"{folder} holds no recorded routing (*.npz)")
    return Recording(tuple(StageRecording(layers, tuple(parts)) for layers, parts in sorted(stages.items())))


def compare(
    recording: Recording, num_ranks: int, *, redundant: int = 0, num_hosts: int = 1, train_share: float = 0.5
) -> tuple[Outcome, ...]:
    """Neighbours together, balanced by the first `train_share` of the recording, and balanced by what is judged:
    the last knows the future and is the bound. `num_ranks` are a stage's. Raises ValueError for what cannot be placed
    or split."""
    num_experts = recording.stages[0].parts[0].shape[1]
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
    known, judged = zip(*(_loads(stage, train_share) for stage in recording.stages), strict=True)

    def even_out(loads: Sequence[_Loads]) -> list[list[ExpertPlacement]]:
        return [
            [balanced(layer, num_ranks, redundant=redundant, num_hosts=num_hosts) for layer in stage] for stage in loads
        ]

    ways: dict[str, Callable[[], list[list[ExpertPlacement]]]] = {
        "contiguous": lambda: [[contiguous(num_experts, num_ranks)] * len(stage) for stage in judged],
        "balanced": lambda: even_out(known),
        "balanced, knowing the future": lambda: even_out(judged),
    }
    return tuple(_judge(name, place(), judged) for name, place in ways.items())


def _loads(stage: StageRecording, train_share: float) -> tuple[_Loads, _Loads]:
    """Of the part to place by, and of the one to judge by."""
    known, judged = (np.sum(parts, axis=0).tolist() for parts in stage.split(train_share))
    return known, judged


def _judge(name: str, placements: Sequence[Sequence[ExpertPlacement]], judged: Sequence[_Loads]) -> Outcome:
    """Both by stage."""
    carried = [
        [rank_loads(place, layer) for place, layer in zip(places, loads, strict=True)]
        for places, loads in zip(placements, judged, strict=True)
    ]
    by_rank = tuple(tuple(sum(rank) for rank in zip(*stage, strict=True)) for stage in carried)
    return Outcome(name, by_rank, step_imbalance([layer for stage in carried for layer in stage]))
