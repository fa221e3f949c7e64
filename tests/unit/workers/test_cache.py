"""How many blocks fit, and what is said when none do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from workers.cache import CacheSize, KVCache, size_cache
from workers.memory import _cgroup_free

SIZE: dict[str, Any] = {
    "bytes_per_token": 1024,
    "block_size": 16,
    "max_model_len": 1000,
    "max_batch_size": 4,
    "limit_bytes": 2**30,
    "limit_name": "resources.cache_size",
}
BLOCKS_PER_SEQUENCE = 63


def test_no_more_blocks_than_a_full_batch_can_use() -> None:
    assert size_cache(CacheSize(**SIZE)) == 4 * BLOCKS_PER_SEQUENCE


def test_as_many_blocks_as_fit() -> None:
    limit_bytes = 100 * 16 * 1024 + 5
    assert size_cache(CacheSize(**SIZE | {"limit_bytes": limit_bytes})) == 100


def test_one_sequence_must_fit() -> None:
    enough = BLOCKS_PER_SEQUENCE * 16 * 1024
    assert size_cache(CacheSize(**SIZE | {"limit_bytes": enough})) == BLOCKS_PER_SEQUENCE
    with pytest.raises(ValueError, match=r"inference\.max_model_len 1000") as caught:
        size_cache(CacheSize(**SIZE | {"limit_bytes": enough - 1}))
    assert "lower inference.max_model_len to 992 or less" in str(caught.value)
    assert "resources.cache_size" in str(caught.value)


@pytest.mark.parametrize("limit_bytes", [0, -5, 100])
def test_nothing_fits(limit_bytes: int) -> None:
    with pytest.raises(ValueError, match="raise that memory"):
        size_cache(CacheSize(**SIZE | {"limit_bytes": limit_bytes}))


def test_what_is_written_is_read_by_blocks() -> None:
    cache = KVCache([3, 5], 4, 2, dtype=torch.float32, device=torch.device("cpu"))
    rows = torch.arange(9.0).view(3, 3)
    cache.layers[0].write(torch.tensor([5, 0, 4]), rows)
    assert torch.equal(
        cache.layers[0].read(torch.tensor([2, 0])), torch.stack((rows[2], rows[0], rows[1], rows[1] * 0))
    )
    assert not cache.layers[1].read(torch.tensor([0, 1, 2, 3])).any()


def test_control_groups_limit_what_is_free(tmp_path: Path) -> None:
    """The tightest group on the way up counts, and page cache does not count as used."""
    child = tmp_path / "pod" / "container"
    child.mkdir(parents=True)
    (tmp_path / "membership").write_text("0::/pod/container\n")
    for folder, limit, used in ((child, "max", 300), (tmp_path / "pod", "1000", 700)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    (tmp_path / "pod" / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    assert min(_cgroup_free(tmp_path, tmp_path / "membership")) == 1000 - 700 + 200
    assert min(_cgroup_free(tmp_path, tmp_path / "absent")) == 2**63
