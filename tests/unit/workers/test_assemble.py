"""Settings that do not fit are refused in clear words; what is assembled says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import tiny_llama
from tests.unit.workers.ranks import Ranks, Sequence_, settings_for, step_of
from workers.assemble import assemble
from workers.kernels.cpu import can_pack
from workers.parallel.collectives import SingleRank
from workers.parallel.plan import ParallelPlan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 513}, "inference.max_model_len 513 exceeds the model's 512 positions"),
        ({"dtype": "float8"}, "inference.dtype must be one of bfloat16, float16, float32, not 'float8'"),
        ({"plan": ParallelPlan(tensor=4)}, "sizes that work: 1, 2"),
        ({"memory_limit_bytes": 100_000}, "the rank's part of resources.memory_limit"),
        ({"cache_bytes": 10_000}, "(resources.cache_size); lower inference.max_model_len to 16 or less"),
        ({"memory_limit_bytes": 350_000}, "what resources.memory_limit leaves beside the weights"),
    ],
)
def test_refusals(folder: Path, changes: dict[str, object], message: str) -> None:
    settings = settings_for(folder, **changes)
    with pytest.raises(ValueError, match=r"must|need|exceeds") as caught:
        assemble(settings, settings.plan.place(0), SingleRank())
    assert message in str(caught.value)


def test_the_report_and_progress(folder: Path) -> None:
    settings = settings_for(folder)
    heard: list[tuple[int, int]] = []
    runner = assemble(settings, settings.plan.place(0), SingleRank(), progress=lambda *state: heard.append(state))
    report = runner.report
    assert heard[-1] == (report.bytes_read, report.bytes_read)
    assert report.weight_bytes == report.bytes_read
    assert report.num_blocks == runner.num_blocks == 8 * 128 // 4
    assert report.cache_bytes == report.num_blocks * 4 * 2 * 2 * 2 * 16 * 4
    assert report.architecture == "llama, 2 layers of 64"
    assert runner.model_config.max_position_embeddings == 512


def test_a_rank_with_less_memory_sets_the_size_for_all(folder: Path) -> None:
    class Poorer(SingleRank):
        def minimum(self, value: int) -> int:
            return value // 2

    settings = settings_for(folder)
    assert assemble(settings, settings.plan.place(0), Poorer()).num_blocks == 8 * 128 // 4 // 2


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="oneDNN has no bfloat16 kernels for this CPU")
@pytest.mark.parametrize("tensor", [1, 2])
def test_bfloat16_is_as_close_to_fp32_as_transformers_is(folder: Path, tensor: int) -> None:
    from transformers import AutoModelForCausalLM

    token_ids = torch.randint(3, 370, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    blocks = list(range(10))

    def ours(dtype: str, size: int) -> torch.Tensor:
        ranks = Ranks(folder, dtype=dtype, tensor=size)
        sequence = Sequence_(token_ids, blocks)
        parts = []
        for count in (30, *[1] * 10):
            parts.append(ranks.forward(step_of([(sequence, count, count)])).float())
            sequence.num_computed += count
        ranks.close()
        return torch.cat(parts)

    exact = ours("float32", 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = model(torch.tensor([token_ids])).logits[0].float()
    assert (ours("bfloat16", tensor) - exact).square().mean() <= 1.2 * (theirs - exact).square().mean()
