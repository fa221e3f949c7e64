"""A cache takes no memory before it is used."""

from __future__ import annotations

import subprocess
import sys

import torch

from workers.cache import KVCache

# In a process of its own: one with a history may be given memory that was in use before, and has to clear it.
_GROWTH = """
import psutil, torch
from workers.cache import KVCache
process = psutil.Process()
before = process.memory_info().rss
cache = KVCache([512] * 4, 4096, 16, dtype=torch.bfloat16, device=torch.device("cpu"))
print(process.memory_info().rss - before)
"""


def test_an_unused_cache_takes_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _GROWTH], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 20, "of 256 MiB"


def test_its_far_ends_are_there() -> None:
    cache = KVCache([512] * 4, 4096, 16, dtype=torch.bfloat16, device=torch.device("cpu"))
    slots = torch.tensor([5, 4096 * 16 - 1])
    cache.layers[2].write(slots, torch.ones(2, 512, dtype=torch.bfloat16))
    read = cache.layers[2].read(torch.tensor([0, 4095]))
    assert read.dtype == torch.bfloat16
    assert read.float().sum(dim=-1).nonzero().flatten().tolist() == [5, 31]
