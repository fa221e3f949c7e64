"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["count", "size"]


def size(size_bytes: int) -> str:
    """Such as "74.5 GiB" or "12.0 MiB"."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes / 1024:.1f} KiB"


def count(number: int, noun: str) -> str:
    """Such as "1 rank" or "163,840 tokens"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
