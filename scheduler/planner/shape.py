"""What a plan is made from, in numbers: the model, the cluster as one engine sees it, and what was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Axes", "ClusterShape", "LayerShape", "ModelShape", "NodeShape", "Wishes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Bytes of one layer's weights: `whole` on every rank, `divided` over the tensor ranks, `expert` of each routed
    expert (0: it has none). `cost` is what the split into stages counts."""

    whole_bytes: int
    divided_bytes: int
    expert_bytes: int = 0
    cost: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A model whose weights are in the form in which they will be held.

    The cache keeps `cache_whole_bytes` of a token in each layer on every rank, and `cache_divided_bytes` over the
    tensor ranks. `packed_head_bytes` is the head once more, in the layout that its kernels want. With `tied` weights
    the head is the embedding where both are of one stage. A `loaded_whole` model is read whole by every rank.
    """

    name: str
    layers: tuple[LayerShape, ...]
    embedding_bytes: int
    head_bytes: int
    packed_head_bytes: int = 0
    tied: bool = False
    head_cost: int = 0
    num_heads: int
    num_kv_heads: int
    tensor_sizes: tuple[int, ...]
    num_experts: int = 0
    cache_whole_bytes: int = 0
    cache_divided_bytes: int = 0
    most_stages: int
    loaded_whole: bool = False

    @property
    def latent(self) -> bool:
        """Whether tensor ranks would each hold a copy of the cache."""
        return self.cache_whole_bytes > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeShape:
    """A node's part for one engine: room for `ranks`, each of which has `memory_bytes`, of which `free_bytes` are not
    in use now; or the ranks of the node share them."""

    ranks: int
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterShape:
    """The nodes of one engine. `shared_memory`: the ranks of a node share its memory, and more of them than the node
    has room for only make each slower. `cache_share` is the part of what is free after loading that caches take;
    `reserve_bytes` of each rank are the runtime's and the step's. With slow links experts stay within a node.

    `rank_noun` is what a rank has, such as "GPU".
    """

    nodes: tuple[NodeShape, ...]
    shared_memory: bool
    cache_share: float
    reserve_bytes: int = 0
    fast_links: bool = True
    rank_noun: str = "rank"

    def times(self, count: int) -> ClusterShape:
        """So many of each node."""
        return replace(self, nodes=self.nodes * count)

    def with_memory(self, size_bytes: int) -> ClusterShape:
        """The same nodes with so much, all of it free."""
        return replace(
            self, nodes=tuple(replace(node, memory_bytes=size_bytes, free_bytes=size_bytes) for node in self.nodes)
        )

    @property
    def num_places(self) -> int:
        return sum(node.ranks for node in self.nodes)

    @property
    def largest(self) -> int:
        """The room of the node with most of it."""
        return max(node.ranks for node in self.nodes)

    def groups_of(self, tensor: int) -> int:
        """How many tensor groups there is room for. Those that no node has room for are spread."""
        if tensor > self.largest:
            return self.num_places // tensor
        return sum(node.ranks // tensor for node in self.nodes)

    def rank_memory(self, num_ranks: int) -> tuple[int, int]:
        """Memory, and what of it is free, of the poorest of `num_ranks` ranks."""
        if not self.shared_memory:
            return min(node.memory_bytes for node in self.nodes), min(node.free_bytes for node in self.nodes)
        spread = -(-num_ranks // len(self.nodes))
        beside = [min(node.ranks, num_ranks) if num_ranks <= self.num_places else spread for node in self.nodes]
        parts = list(zip(self.nodes, beside, strict=True))
        return min(node.memory_bytes // n for node, n in parts), min(node.free_bytes // n for node, n in parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """A plan, as `workers.parallel.plan.ParallelPlan` has it."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    redundant_experts: int = 0

    @property
    def num_ranks(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def expert(self) -> int:
        """Ranks of a stage over which routed experts are spread."""
        return self.data * self.tensor

    def __str__(self) -> str:
        text = f"data {self.data} x pipeline {self.pipeline} x tensor {self.tensor}"
        return f"{text} + {self.redundant_experts} redundant experts" if self.redundant_experts else text


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What was asked for. An axis that is None is the planner's to choose; so is a cache's size."""

    max_model_len: int
    max_batch_size: int
    block_size: int = 16
    deterministic: bool = False
    cache_bytes: int | None = None
    data: int | None = None
    pipeline: int | None = None
    tensor: int | None = None
    redundant_experts: int | None = None

    @property
    def open(self) -> bool:
        """Whether anything is left to choose."""
        return None in (self.data, self.pipeline, self.tensor, self.redundant_experts)

    @property
    def sequence_tokens(self) -> int:
        """What one sequence of full length takes of a cache."""
        return -(-self.max_model_len // self.block_size) * self.block_size
