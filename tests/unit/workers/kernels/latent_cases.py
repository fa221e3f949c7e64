"""Decoding sequences over a paged cache of latents, for every implementation of latent attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.cache import LayerCache
from workers.step import DecodeGroup

__all__ = ["CASES", "LatentCase"]


@dataclass(frozen=True, slots=True)
class LatentCase:
    """`lengths` of the sequences; a row of the cache is a latent of `rank` and a key of `rope` elements."""

    lengths: tuple[int, ...]
    heads: int
    rank: int
    rope: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    scale: float = 0.07

    def tensors(self) -> tuple[torch.Tensor, LayerCache, DecodeGroup]:
        """Queries that lie apart in a wider tensor, the cache, and a group whose blocks lie in no order."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.heads)
        columns = -(-max(self.lengths) // self.block_size)
        num_blocks = columns * len(self.lengths) + 3
        row = self.rank + self.rope
        q = torch.randn(len(self.lengths), self.heads, row + 8, generator=generator).to(self.dtype)[..., :row]
        slots = torch.randn(num_blocks * self.block_size, row, generator=generator).to(self.dtype)
        order = torch.randperm(num_blocks, generator=generator)[: columns * len(self.lengths)]
        lengths = torch.tensor(self.lengths)
        hidden = torch.arange(max(self.lengths)) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)[:, None, None, :]
        group = DecodeGroup(0, len(lengths), order, lengths, max(self.lengths), mask)
        return q, LayerCache(slots, self.block_size), group

    def run(self, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """By an `attend_latent_paged`."""
        q, cache, group = self.tensors()
        table = group.block_ids.view(len(q), -1)
        sizes = {"block_size": self.block_size, "rank": self.rank, "scale": self.scale}
        return attend(q, cache.slots, table, group.lengths, **sizes)

    def one_by_one(self) -> torch.Tensor:
        """The oracle, in fp32: sequence by sequence."""
        q, cache, group = self.tensors()
        rows = []
        for index, length in enumerate(self.lengths):
            kept = cache.read(group.block_ids.view(len(q), -1)[index])[:length].float()
            weights = (q[index].float() @ kept.T * self.scale).softmax(-1)
            rows.append(weights @ kept[:, : self.rank])
        return torch.stack(rows)


CASES = [
    LatentCase((1, 5, 64, 130), heads=6, rank=32, rope=32),
    LatentCase((3,), heads=4, rank=24, rope=8, block_size=4),
    LatentCase((65, 2, 513), heads=17, rank=64, rope=16, block_size=8),
    # Triton's interpreter knows no bf16
    LatentCase((40, 17), heads=16, rank=128, rope=64, dtype=torch.float16),
]
