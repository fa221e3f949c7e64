"""How an engine is cut over ranks: one value, checked once, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ParallelPlan", "RankPlace"]


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank stands in its engine; `dp_group` counts the data axis."""

    rank: int
    dp_group: int
    stage: int
    tensor_index: int
    first_in_group: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPlan:
    """`data x pipeline x tensor` ranks; routed experts are spread over the `data x tensor` ranks of a stage.

    Ranks are numbered with tensor innermost, then pipeline, then data, so that a DP group is a run of neighbours.
    Raises ValueError naming the axis for a value below one.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    redundant_experts: int = 0

    def __post_init__(self) -> None:
        for axis in ("data", "pipeline", "tensor"):
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis} must be at least 1, not {getattr(self, axis)}")
        if self.redundant_experts < 0:
            raise ValueError(f"parallel.redundant_experts must be at least 0, not {self.redundant_experts}")

    @property
    def num_ranks(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def group_size(self) -> int:
        """Ranks that share one batch."""
        return self.pipeline * self.tensor

    @property
    def expert(self) -> int:
        """Ranks of one stage over which the routed experts are spread."""
        return self.data * self.tensor

    def place(self, rank: int) -> RankPlace:
        """Where `rank` stands."""
        assert 0 <= rank < self.num_ranks
        dp_group, in_group = divmod(rank, self.group_size)
        stage, tensor_index = divmod(in_group, self.tensor)
        return RankPlace(rank, dp_group, stage, tensor_index, in_group == 0)

    def __str__(self) -> str:
        text = f"data {self.data} x pipeline {self.pipeline} x tensor {self.tensor}"
        return f"{text} + {self.redundant_experts} redundant experts" if self.redundant_experts else text
