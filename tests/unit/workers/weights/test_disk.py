"""The disk's speed: what was read, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.weights.disk import DiskSpeed, measure


@pytest.mark.parametrize("size_bytes", [0, 1000, 9_000_001])
def test_reads_no_more_than_there_is(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(size_bytes))
    speed = measure(path)
    assert speed.size_bytes == size_bytes or speed.seconds >= 0.25
    assert speed.seconds > 0


def test_says_whether_the_page_cache_may_have_helped() -> None:
    assert str(DiskSpeed(64_000_000, 0.125, True)) == "0.51 GB/s (64 MB read in order, past the page cache)"
    assert "perhaps from the page cache" in str(DiskSpeed(1, 1.0, False))
