"""How fast this machine's memory can be read: `python -m tests.integration.measure_memory`.

In the manner of STREAM (McCalpin, 1995): arrays far larger than the caches, each pass timed, the best pass counts.
Reading alone, because that is what a token's weights ask for; by whichever of a few operations reads fastest.
"""

from __future__ import annotations

import argparse
import time

import torch

__all__ = ["read_bandwidth"]

_ARRAY_BYTES = 1 << 30
_ARRAYS, _PASSES = 2, 3


def read_bandwidth(num_threads: int, array_bytes: int = _ARRAY_BYTES) -> float:
    """Bytes a second that so many threads read. Takes `_ARRAYS * array_bytes` of memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        arrays = [torch.ones(array_bytes // 4) for _ in range(_ARRAYS)]
        best_s = float("inf")
        for _ in range(_PASSES):
            for read in (torch.sum, torch.max, lambda x: torch.dot(x, x)):
                for array in arrays:  # by turns: none is what the cache still holds
                    started_s = time.perf_counter()
                    read(array)
                    best_s = min(best_s, time.perf_counter() - started_s)
        return array_bytes / best_s
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    for num_threads in parser.parse_args().threads:
        print(f"{num_threads} thread(s): {read_bandwidth(num_threads) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
