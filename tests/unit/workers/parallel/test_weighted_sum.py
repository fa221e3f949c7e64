"""The sum of a token's expert outputs, against a loop; the same bits whatever else is summed in the call."""

from __future__ import annotations

import pytest
import torch

from workers.parallel.moves import weighted_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(0, 3, 8), (1, 4, 64), (700, 4, 96), (90, 8, 1024)])
def test_rows_find_their_tokens(num_tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    y = torch.randn(num_tokens * top_k, width, generator=generator).to(dtype)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    order = torch.randperm(num_tokens * top_k, generator=generator)
    out = weighted_sum(y, order, weights)
    assert out.dtype == dtype
    placed = torch.empty_like(y)
    placed[order] = y
    placed = placed.view(num_tokens, top_k, width).float()
    torch.testing.assert_close(out, (placed * weights[:, :, None]).sum(dim=1).to(dtype))
    for token in range(0, num_tokens, 13):
        alone = weighted_sum(placed[token].to(dtype), torch.arange(top_k), weights[token : token + 1])
        assert torch.equal(alone[0], out[token])


def test_a_choice_without_a_row_counts_as_zeros() -> None:
    y = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    weights = torch.tensor([[0.5, 0.25], [2.0, 4.0], [1.0, 1.0]])
    out = weighted_sum(y, torch.tensor([1, 2]), weights)
    assert out.tolist() == [[0.25, 0.5], [20.0, 40.0], [0.0, 0.0]]
