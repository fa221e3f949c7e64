"""Decoding sequences in a paged cache, for every implementation of `attend_paged`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

__all__ = ["CASES", "PagedCase", "one_by_one"]


@dataclass(frozen=True, slots=True)
class PagedCase:
    """`lengths` of the sequences; a row of the cache holds `kv_heads` keys of `width` and as many values."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    block_size: int
    dtype: torch.dtype = torch.float32

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries that lie apart in a wider tensor, the cache, a table of scattered blocks, and the lengths."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.heads)
        columns = -(-max(self.lengths) // self.block_size) + 1
        num_blocks = columns * len(self.lengths) + 3
        wide = (self.heads + 2 * self.kv_heads) * self.width
        q = torch.randn(len(self.lengths), wide, generator=generator).to(self.dtype)[:, : self.heads * self.width]
        slots = torch.randn(num_blocks * self.block_size, 2 * self.kv_heads * self.width, generator=generator)
        order = torch.randperm(num_blocks, generator=generator)
        table = order[: columns * len(self.lengths)].view(len(self.lengths), columns)
        return q, slots.to(self.dtype), table, torch.tensor(self.lengths)

    def run(self, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        return attend(*self.tensors(), block_size=self.block_size, kv_heads=self.kv_heads, width=self.width)


CASES = [
    PagedCase((1, 5, 64, 130), heads=6, kv_heads=2, width=16, block_size=16),
    PagedCase((3,), heads=4, kv_heads=4, width=20, block_size=4),
    PagedCase((65, 2), heads=9, kv_heads=1, width=64, block_size=8),
    # Triton's interpreter knows no bf16
    PagedCase((40, 17), heads=4, kv_heads=2, width=32, block_size=16, dtype=torch.float16),
]


def one_by_one(case: PagedCase) -> torch.Tensor:
    """The oracle, in fp32: each sequence's own keys and values, one head after the other."""
    q, slots, table, _ = case.tensors()
    rows = []
    for index, length in enumerate(case.lengths):
        places = [
            int(table[index, n // case.block_size]) * case.block_size + n % case.block_size for n in range(length)
        ]
        kept = slots[places].float()
        heads = []
        for head in range(case.heads):
            kv_head = head * case.kv_heads // case.heads
            key = kept[:, kv_head * case.width : (kv_head + 1) * case.width]
            start = (case.kv_heads + kv_head) * case.width
            query = q[index, head * case.width : (head + 1) * case.width].float()
            weights = F.softmax(key @ query / case.width**0.5, dim=0)
            heads.append(weights @ kept[:, start : start + case.width])
        rows.append(torch.cat(heads))
    return torch.stack(rows)
