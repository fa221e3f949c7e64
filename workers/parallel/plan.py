"""How an engine is cut over ranks: one value, checked once, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ParallelPlan", "RankPlace"]


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank stands in its engine; `dp_group` counts the data axis, `expert_index` the ranks of its stage."""

    rank: int
    dp_group: int
    stage: int
    tensor_index: int
    expert_index: int
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
        expert_index = dp_group * self.tensor + tensor_index
        return RankPlace(rank, dp_group, stage, tensor_index, expert_index, in_group == 0)

    def group(self, dp_group: int) -> range:
        """The ranks of a DP group."""
        return range(dp_group * self.group_size, (dp_group + 1) * self.group_size)

    def tensor_group(self, rank: int) -> range:
        """The ranks that share each layer with `rank`, itself included."""
        first = rank // self.tensor * self.tensor
        return range(first, first + self.tensor)

    def column(self, rank: int) -> range:
        """The ranks of the group's stages that hand tokens on to each other, `rank` among them."""
        group = self.group(rank // self.group_size)
        return range(group.start + rank % self.tensor, group.stop, self.tensor)

    def stage_ranks(self, stage: int) -> tuple[int, ...]:
        """The ranks of all groups that hold the layers of a stage, in order of `expert_index`."""
        starts = (group * self.group_size + stage * self.tensor for group in range(self.data))
        return tuple(rank for start in starts for rank in range(start, start + self.tensor))

    def sampling_rank(self, dp_group: int) -> int:
        """The rank of a group at which logits come out."""
        return self.group(dp_group).stop - self.tensor

    def __str__(self) -> str:
        text = f"data {self.data} x pipeline {self.pipeline} x tensor {self.tensor}"
        return f"{text} + {self.redundant_experts} redundant experts" if self.redundant_experts else text
