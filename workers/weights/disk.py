"""How fast the disk alone is: a few megabytes of a file read in order, past the page cache where that can be."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DiskSpeed", "measure"]

_BLOCK_BYTES = 4 << 20  # a multiple of any disk's sector, as direct reads must be
_MAX_BYTES = 64 << 20
_MAX_S = 0.25


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """`direct`: not from the page cache. Where it is False the file may have been in memory."""

    size_bytes: int
    seconds: float
    direct: bool

    def __str__(self) -> str:
        rate = self.size_bytes / max(self.seconds, 1e-9) / 1e9
        cache = "past the page cache" if self.direct else "perhaps from the page cache"
        return f"{rate:.2f} GB/s ({self.size_bytes / 1e6:.0f} MB read in order, {cache})"


def measure(path: Path) -> DiskSpeed:
    """Reads the beginning of `path`, for a quarter of a second at most."""
    try:
        return _read(path, os.O_DIRECT, direct=True)
    except OSError:  # the file system has no direct reads
        return _read(path, 0, direct=False)


def _read(path: Path, flags: int, *, direct: bool) -> DiskSpeed:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        with mmap.mmap(-1, _BLOCK_BYTES) as memory:  # begins at a page, as direct reads must
            size_bytes, started_s = 0, time.perf_counter()
            while size_bytes < _MAX_BYTES and time.perf_counter() - started_s < _MAX_S:
                count = os.preadv(file, [memory], size_bytes)
                size_bytes += count
                if count < _BLOCK_BYTES:
                    break
            return DiskSpeed(size_bytes, time.perf_counter() - started_s, direct)
    finally:
        os.close(file)
