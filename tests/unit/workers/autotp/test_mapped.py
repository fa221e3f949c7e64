"""A model that will be cut is mapped, not read; what a rank keeps of it is its own, in the dtype that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.workers.autotp.cases import checkpoint_of
from workers.autotp import load
from workers.autotp.load import _answer, _cut, _probes, _read, _stored_dtype
from workers.weights.index import TensorEntry


class Rank:
    """One of two; `others` is the smallest value that the other one brings to an agreement."""

    size = 2
    kind = "none"

    def __init__(self, index: int, others: int = 1) -> None:
        self.index = index
        self._others = others
        self.agreements: list[int] = []

    def minimum(self, value: int) -> int:
        self.agreements.append(value)
        return min(value, self._others)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not reached")

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        raise AssertionError("not reached")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    checkpoint_of(folder, "mistral: a window")
    return folder


def _model(folder: Path) -> Any:
    import transformers

    return _read(folder, transformers.AutoConfig.from_pretrained(folder), torch.float32)


def _storages(model: Any) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def _halve(model: Any, tensor: object, dtype: torch.dtype, settle_s: tuple[float, float]) -> None:
    """As DeepSpeed: copies of parts, and everything else rounded where it lies."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.chunk(2)[1].clone()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_no_part_of_a_file(mistral: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(load, "cut", _halve)
    model, rank = _model(mistral), Rank(1)
    mapped = _storages(model)
    embedding = model.model.embed_tokens.weight.clone()
    angles = [buffer.clone() for buffer in model.buffers()]
    part_bytes = _cut(model, rank, torch.float32, dtype, (3.0, 30.0))
    assert not mapped & _storages(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert part_bytes * dtype.itemsize == sum(parameter.nbytes for parameter in model.parameters()) * 4
    assert torch.equal(model.model.embed_tokens.weight, embedding.to(dtype))
    assert angles
    assert all(torch.equal(now, before) for now, before in zip(model.buffers(), angles, strict=True))
    assert len(rank.agreements) == 1, "the ranks wait for one another before the first pass"


def test_the_first_rank_alone_computes_with_the_whole_model(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(mistral)
    first = _probes(model, 203, 64, Rank(0))
    assert [len(probe.logits) for probe in first] == [len(probe.token_ids) for probe in first]
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("it would read what is not its part"))
    second = _probes(model, 203, 64, Rank(1))
    assert [probe.token_ids for probe in second] == [probe.token_ids for probe in first]
    assert not any(len(probe.logits) for probe in second)


def test_all_ranks_hear_of_a_model_that_does_not_run(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, first = _model(mistral), Rank(0)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such operation")

    with pytest.raises(ValueError, match="another rank could not run this mistral model"):
        _probes(model, 203, 64, Rank(1, others=0))
    monkeypatch.setattr(load, "_answer", fails)
    with pytest.raises(RuntimeError, match="no such operation"):
        _probes(model, 203, 64, first)
    assert first.agreements == [0]
    assert _answer(model, 203, 64, answered=False)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("F32", "BF16", "BF16"), torch.bfloat16),
        (("F32",), torch.float32),
        (("F16", "F16", "I8"), torch.float16),
        (("I8", "I8", "F32"), torch.bfloat16),
    ],
)
def test_the_dtype_of_most_of_the_checkpoint(dtypes: tuple[str, ...], expected: torch.dtype) -> None:
    entries = [TensorEntry(Path(), dtype, (4,), 0, 16) for dtype in dtypes]
    assert _stored_dtype(entries, torch.bfloat16) == expected
