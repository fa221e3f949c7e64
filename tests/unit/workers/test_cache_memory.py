"""A cache takes no memory before it is used."""

from __future__ import annotations

import psutil
import torch

from workers.cache import KVCache


def test_an_unused_cache_takes_no_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache([512] * 4, 4096, 16, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert process.memory_info().rss - before < 32 << 20, "of 256 MiB"
    slots = torch.tensor([5, 4096 * 16 - 1])
    cache.layers[2].write(slots, torch.ones(2, 512, dtype=torch.bfloat16))
    read = cache.layers[2].read(torch.tensor([0, 4095]))
    assert read.dtype == torch.bfloat16
    assert read.float().sum(dim=-1).nonzero().flatten().tolist() == [5, 31]
