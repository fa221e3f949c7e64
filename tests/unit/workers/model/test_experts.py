"""Experts in slots, and the tiles their rows are run in."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from workers.kernels.reference import ReferenceKernels
from workers.model.experts import Experts, tiles
from workers.parallel.dispatch import ExpertRows


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 600), min_size=1, max_size=6))
def test_tiles_cover_every_row_once(counts: list[int]) -> None:
    num_rows, start = sum(counts), 0
    sizes = set()
    for count in counts:
        covered: list[int] = []
        for first, last, skip, size in tiles(start, start + count, num_rows):
            assert 0 <= first < last <= num_rows
            assert skip + size <= last - first
            covered += range(first + skip, first + skip + size)
            sizes.add(last - first)
        assert covered == list(range(start, start + count))
        start += count
    assert len(sizes) <= 8 + 256 // 16 + 1, "each size is prepared once by the matrix library"


def test_a_slot_runs_the_expert_that_it_holds() -> None:
    generator = torch.Generator().manual_seed(5)
    gate_up, down = torch.randn(3, 28, 12, generator=generator), torch.randn(3, 12, 14, generator=generator)
    experts = Experts(2, ReferenceKernels())
    experts.put(0, gate_up[0], down[0])
    experts.put(1, gate_up[1], down[1])
    x = torch.randn(40, 12, generator=generator)

    def check(held: list[int]) -> None:
        for counts in ([40, 0], [0, 40], [3, 37], [39, 1]):
            y = experts(ExpertRows(x, counts))
            number = torch.tensor(held).repeat_interleave(torch.tensor(counts))
            gate, up = (gate_up[number] @ x.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
            expected = (down[number] @ (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)

    check([0, 1])
    experts.put(1, gate_up[2], down[2])
    check([0, 2])
    assert experts(ExpertRows(x[:0], [0, 0])).shape == (0, 12)
