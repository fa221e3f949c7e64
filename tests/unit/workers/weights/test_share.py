"""Ranks read their own share of a checkpoint, and together what every one of them needs once each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.checkpoints import tiny_deepseek, tiny_llama
from tests.unit.workers.ranks import Ranks
from workers.weights.index import read_index

# What tensor ranks hold in full: norms, the gate, and the projections to the latents that all heads share.
_EVERYWHERE = re.compile(r"norm\.weight$|\.gate\.|_correction_bias$|q_a_proj|kv_a_proj")


@pytest.mark.parametrize("make", [tiny_deepseek, tiny_llama])
def test_bytes_read(tmp_path: Path, make: object) -> None:
    assert callable(make)
    folder = make(tmp_path)
    index = read_index(folder)
    total = sum(entry.size_bytes for entry in index.values())
    everywhere = sum(entry.size_bytes for name, entry in index.items() if _EVERYWHERE.search(name))
    for size in (1, 2):
        ranks = Ranks(folder, tensor=size)
        read = [runner.report.bytes_read for runner in ranks.runners]
        ranks.close()
        assert sum(read) == total + (size - 1) * everywhere
        assert max(read) - min(read) < total / 100, "the shares are even"
