"""The ends of a stage: where a step's rows come from, and what becomes of them behind the last layer.

The first stage looks tokens up and the last one makes logits; between stages rows are handed on. A model of one stage
has the first of one and the last of the other, and the decoder cannot tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from workers.kernels.seam import Norm
from workers.model.head import Head
from workers.model.parallel_linear import Embedding
from workers.parallel.stages import Stages
from workers.step import StepTensors

__all__ = ["Entrance", "Exit", "FromStage", "LookUp", "ToLogits", "ToStage"]


class Entrance(Protocol):
    def __call__(self, step: StepTensors) -> torch.Tensor:
        """Rows [T, hidden] in fp32, in memory of their own."""
        ...


class Exit(Protocol):
    def __call__(self, x: torch.Tensor, step: StepTensors) -> torch.Tensor | None:
        """Takes x [T, hidden] in fp32 over; logits where this rank has them."""
        ...

    def keep_step(self, nothing: torch.Tensor) -> None:
        """Joins a step for which this rank has no tokens; `nothing` is [0, hidden]."""
        ...


@dataclass(frozen=True, slots=True)
class LookUp:
    embedding: Embedding

    def __call__(self, step: StepTensors) -> torch.Tensor:
        return self.embedding(step.token_ids)


@dataclass(frozen=True, slots=True)
class FromStage:
    stages: Stages
    width: int
    device: torch.device

    def __call__(self, step: StepTensors) -> torch.Tensor:
        return self.stages.receive(len(step.token_ids), self.width, dtype=torch.float32, device=self.device)


@dataclass(frozen=True, slots=True)
class ToLogits:
    """Of the rows that need them."""

    norm: Norm
    head: Head

    def __call__(self, x: torch.Tensor, step: StepTensors) -> torch.Tensor | None:
        if step.logit_rows is not None:
            x = x.index_select(0, step.logit_rows)
        return self.head(self.norm(x))

    def keep_step(self, nothing: torch.Tensor) -> None:
        self.head.keep_step(nothing)


@dataclass(frozen=True, slots=True)
class ToStage:
    stages: Stages

    def __call__(self, x: torch.Tensor, step: StepTensors) -> torch.Tensor | None:
        self.stages.send(x)
        return None

    def keep_step(self, nothing: torch.Tensor) -> None:
        """Nothing is handed on."""
