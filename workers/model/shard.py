"""The local sizes of one rank: its stage's layers, and its part of each."""

from __future__ import annotations

from dataclasses import dataclass

from workers.model.config import ModelConfig

__all__ = ["Shard"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the model a rank holds.

    `experts` are the routed experts of its slots, the same in every layer; `fused_experts` says that the checkpoint
    keeps a layer's experts in two tensors rather than three for each. `layers` are those of its pipeline stage: all
    unless others are named.
    """

    config: ModelConfig
    index: int
    size: int
    experts: tuple[int, ...] = ()
    fused_experts: bool = False
    layers: range = range(0)

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", range(self.config.num_layers))

    @property
    def is_first(self) -> bool:
        """Whether it is of the stage that looks tokens up."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it is of the stage that makes logits."""
        return self.layers.stop == self.config.num_layers

    @property
    def num_heads(self) -> int:
        return self.config.num_heads // self.size

    @property
    def num_kv_heads(self) -> int:
        return self.config.num_kv_heads // self.size

    @property
    def cache_row(self) -> int:
        """Elements per token and layer that the rank's cache holds."""
        if self.config.mla is not None:
            return self.config.mla.cache_row
        return 2 * self.num_kv_heads * self.config.head_dim

    @property
    def intermediate(self) -> tuple[int, int]:
        """This rank's part of the MLP's inner width; the parts may differ by one."""
        return self.part(self.config.intermediate_size)

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary per rank, the same on all so that logits can be gathered."""
        return -(-self.config.vocab_size // self.size)

    @property
    def vocab(self) -> tuple[int, int]:
        """This rank's token ids; the last ranks may have fewer than `vocab_rows`."""
        total = self.config.vocab_size
        return min(total, self.vocab_rows * self.index), min(total, self.vocab_rows * (self.index + 1))

    def part(self, total: int) -> tuple[int, int]:
        """The rank's part of `total` things; the parts may differ by one."""
        return total * self.index // self.size, total * (self.index + 1) // self.size

    def heads(self, total: int, width: int) -> tuple[int, int]:
        """The rows of the rank's equal part of `total` heads of `width` rows."""
        part = total // self.size * width
        return part * self.index, part * (self.index + 1)
