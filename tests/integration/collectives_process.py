"""One rank that tries its collectives in one generation after the other and prints what it found, as JSON.

python -m tests.integration.collectives_process SETTINGS.json RANK PORT GENERATION...
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from workers.parallel.collectives import Collectives
from workers.parallel.groups import Groups
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

HOST = "127.0.0.1"
# Odd sizes, and both ways of the shared-memory op: it changes its algorithm at a mebibyte.
SHAPES = [(1,), (16, 576), (7, 1001), (300, 2304), (3, 400_003)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small integers: their sums are exact in every dtype."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wrong_sums(tensor: Collectives) -> list[str]:
    """Every all-reduce that gave anything but the sum, in and out of place, contiguous or not."""
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        for shape in SHAPES:
            for turn in range(3):
                parts = [numbers(shape, dtype, 10 * index + turn) for index in range(tensor.size)]
                if not torch.equal(
                    tensor.all_reduce(parts[tensor.index].clone()), sum(parts, torch.zeros((), dtype=dtype))
                ):
                    wrong.append(f"{dtype} {shape}")
    parts = [numbers((64, 48), torch.float32, index) for index in range(tensor.size)]
    if not torch.equal(
        tensor.all_reduce(parts[tensor.index].clone().t()), sum((part.t() for part in parts), torch.zeros(()))
    ):
        wrong.append("transposed")
    return wrong


def sums_of_fractions(tensor: Collectives) -> str:
    """A digest of them: they are rounded, in whichever order they are added up."""
    found = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[1:]:
            generator = torch.Generator().manual_seed(tensor.index)
            total = tensor.all_reduce(torch.randn(shape, generator=generator).to(dtype))
            found.update(total.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def gathered(tensor: Collectives) -> bool:
    """Whether the parts came together at index 0, and there alone."""
    parts = [numbers((5, 33), torch.bfloat16, index) for index in range(tensor.size)]
    whole = tensor.gather(parts[tensor.index])
    return whole is None if tensor.index else whole is not None and torch.equal(whole, torch.cat(parts, dim=-1))


def try_out(tensor: Collectives, rank: int) -> dict[str, Any]:
    return {
        "kind": tensor.kind,
        "wrong_sums": wrong_sums(tensor),
        "sums_of_fractions": sums_of_fractions(tensor),
        "gathered": gathered(tensor),
        "minimum": tensor.minimum(100 + rank),
    }


def main(settings_path: str, rank: int, port: int, generations: list[int]) -> None:
    torch.set_num_threads(1)
    values = json.loads(Path(settings_path).read_text())
    settings = EngineSettings(**{**values, "plan": ParallelPlan(**values["plan"])})
    hosts = dict.fromkeys(range(settings.plan.num_ranks), HOST)
    found = []
    for generation in generations:
        groups = Groups.join(settings, rank, generation=generation, store=(HOST, port), hosts=hosts)
        found.append(try_out(groups.tensor, rank))
        groups.close()
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [int(number) for number in sys.argv[4:]])
