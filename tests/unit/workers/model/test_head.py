"""The head's candidates are exact, and a row's logits do not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.build import build
from workers.kernels.native import NativeKernels, find_native
from workers.kernels.reference import ReferenceKernels
from workers.kernels.seam import Kernels
from workers.model.head import CANDIDATES


@pytest.fixture(params=["plain", "native"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "plain":
        return ReferenceKernels()
    build()
    library = find_native()
    assert library is not None
    return NativeKernels(library)


def test_the_likeliest_are_exact_and_the_rest_untouched(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(500, 48, generator=generator).bfloat16()
    x = torch.randn(70, 48, generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    rounded = exact.bfloat16()
    refined = kernels.refine(rounded, x, weight, CANDIDATES)
    assert refined.dtype == torch.float32
    top = rounded.topk(CANDIDATES, dim=-1).values[:, -1:]
    above, below = rounded > top, rounded < top
    assert above.sum() > 70 * CANDIDATES / 2
    torch.testing.assert_close(refined[above].double(), exact[above], atol=1e-4, rtol=1e-5)
    assert torch.equal(refined[below], rounded[below].float())
    for row in (0, 33, 69):
        assert torch.equal(
            kernels.refine(rounded[row : row + 1], x[row : row + 1], weight, CANDIDATES)[0], refined[row]
        )


def test_a_tie_of_rounding_is_decided_by_the_true_value(kernels: Kernels) -> None:
    x = torch.ones(1, 2).bfloat16()
    weight = torch.tensor([[25.0, 0.25], [25.0, 0.28], [1.0, 1.0]]).bfloat16()
    rounded = (x.float() @ weight.float().T).bfloat16()
    assert rounded[0, 0] == rounded[0, 1]
    assert int(kernels.refine(rounded, x, weight, CANDIDATES).argmax()) == 1


def test_fp32_logits_stay_as_they_are(kernels: Kernels) -> None:
    logits = torch.randn(3, 40)
    assert kernels.refine(logits, torch.randn(3, 8), torch.randn(40, 8), CANDIDATES) is logits
