"""Recorded decode steps: buffers, padding and order, by a capture that runs again; and that no step waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import tiny_llama
from tests.unit.workers.model.stepping import BLOCK_SIZE, LENGTH, run, sequences
from tests.unit.workers.ranks import Ranks, step_of
from workers import assemble
from workers.cache import KVCache
from workers.graphs import Recording, batch_sizes
from workers.inputs import StepInputs
from workers.kernels.cuda import CudaKernels
from workers.model.build import build_decoder
from workers.model.config import parse_config
from workers.model.sharding import Shard, shard_parameters
from workers.parallel.collectives import SingleRank
from workers.parallel.dispatch import LocalDispatch, Routing
from workers.step import build_tensors
from workers.weights.random_checkpoint import SHAPES, random_checkpoint


class Again:
    """Replays by calling the function again and copying its result to where the first one was."""

    def __init__(self) -> None:
        self.replays = 0
        self.recordings = 0

    def __call__(self, run: Callable[[], torch.Tensor | None]) -> Recording:
        output = run()
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            found = run()
            if output is not None:
                assert found is not None
                output.copy_(found)

        return Recording(output, replay)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def _ranks(model: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Ranks:
    """On the kernels of a GPU, of which torch does all on a CPU."""
    monkeypatch.setattr(assemble, "select_kernels", lambda *_, **__: CudaKernels({}))
    return Ranks(model, block_size=BLOCK_SIZE, **changes)


def test_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(32) == [1, 2, 4, 8, 16, 24, 32]


@pytest.mark.parametrize("tensor", [1, 2])
def test_replayed_steps_give_what_the_plain_ones_do(model: Path, monkeypatch: pytest.MonkeyPatch, tensor: int) -> None:
    plain = Ranks(model, block_size=BLOCK_SIZE, tensor=tensor)
    graphed = _ranks(model, monkeypatch, tensor=tensor)
    captures = [Again() for _ in graphed.runners]
    graphed._all(
        list(zip(graphed.runners, captures, strict=True)),
        lambda pair: pair[0].record_decoding(pair[1], max_batch_size=6, max_model_len=128),
    )
    assert all(capture.recordings == 4 for capture in captures)
    rng = random.Random(7)
    expected, found = sequences(6, seed=8), sequences(6, seed=8)
    lengths = [rng.randint(1, len(s.token_ids) - 1) for s in found]
    for ranks, group in ((plain, expected), (graphed, found)):
        run(ranks, list(zip(group, lengths, strict=True)))
    assert captures[0].replays == 0, "a prompt is no decode step"
    replayed = 0
    while open_ := [n for n, s in enumerate(found) if s.num_computed < len(s.token_ids)]:
        chosen = rng.sample(open_, rng.randint(1, len(open_)))
        run(plain, [(expected[n], 1) for n in chosen])
        run(graphed, [(found[n], 1) for n in chosen])
        replayed += 1
    assert captures[0].replays == replayed > LENGTH // 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), rtol=0, atol=1e-4)
    plain.close()
    graphed.close()


def test_a_larger_batch_than_was_recorded_runs_plainly(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = _ranks(model, monkeypatch)
    capture = Again()
    ranks.runners[0].record_decoding(capture, max_batch_size=2, max_model_len=128)
    found = sequences(3, seed=9)
    ranks.forward(step_of([(sequence, 1, 1) for sequence in found]))
    assert capture.replays == 0
    for sequence in found:
        sequence.num_computed = 1
    ranks.forward(step_of([(sequence, 1, 1) for sequence in found[:2]]))
    assert capture.replays == 1
    ranks.close()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32}
    widths = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 96}
    experts = {"n_routed_experts": 8, "moe_intermediate_size": 16, "vocab_size": 203, "max_position_embeddings": 256}
    random_checkpoint(folder, SHAPES["v3-0.7b"] | sizes | widths | experts, dtype="bfloat16")
    return folder


def _grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CudaKernels({})
    kernels.groups_experts = True  # a loop on a CPU, the same numbers
    monkeypatch.setattr(assemble, "select_kernels", lambda *_, **__: kernels)


@pytest.mark.parametrize("tensor", [1, 2])
def test_experts_and_latent_attention_are_replayed(mixture: Path, monkeypatch: pytest.MonkeyPatch, tensor: int) -> None:
    _grouping(monkeypatch)
    changes: dict[str, Any] = {"tensor": tensor, "dtype": "bfloat16", "block_size": BLOCK_SIZE}
    plain, graphed = Ranks(mixture, **changes), Ranks(mixture, **changes)
    captures = [Again() for _ in graphed.runners]
    graphed._all(
        list(zip(graphed.runners, captures, strict=True)),
        lambda pair: pair[0].record_decoding(pair[1], max_batch_size=4, max_model_len=128),
    )
    for runner in graphed.runners:
        assert runner.report.kernels.endswith("; CUDA graphs for decoding")
        assert not any(int(found.counts.sum()) for found in runner._decoder.mixtures.values()), "tokens of no request"
    expected, found = sequences(3, seed=8), sequences(3, seed=8)
    for ranks, group in ((plain, expected), (graphed, found)):
        run(ranks, [(sequence, 2 + n) for n, sequence in enumerate(group)])
        for _ in range(6):
            run(ranks, [(sequence, 1) for sequence in group if sequence.num_computed < len(sequence.token_ids)])
    assert captures[0].replays == 6
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), rtol=0, atol=0.05)
    plain.close()
    graphed.close()


def test_choices_are_not_replayed_past_who_records_them(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _grouping(monkeypatch)
    ranks = Ranks(mixture, dtype="bfloat16", block_size=BLOCK_SIZE)
    (runner,), capture = ranks.runners, Again()
    runner.record_decoding(capture, max_batch_size=2, max_model_len=128)
    heard: list[int] = []

    class Recorder:
        def record(self, layer: int, routing: Routing) -> None:
            heard.append(layer)

    (sequence,) = sequences(1, seed=9)
    for recorder, replays in ((None, 1), (Recorder(), 1), (None, 2)):
        runner.record_routing(recorder)
        run(ranks, [(sequence, 1)])
        assert capture.replays == replays
    assert heard == list(runner._decoder.mixtures)
    ranks.close()


def test_recordings_end_with_the_generation_of_their_ranks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = _ranks(model, monkeypatch)
    (runner,), capture = ranks.runners, Again()
    meetings = 1
    runner.record_decoding(capture, max_batch_size=2, max_model_len=128, meetings=lambda: meetings)
    (sequence,) = sequences(1, seed=9)
    run(ranks, [(sequence, 1)])
    meetings = 2
    run(ranks, [(sequence, 1)])
    assert capture.replays == 1
    assert runner.report.kernels.endswith("; no CUDA graphs: the ranks have met anew since they were recorded")
    ranks.close()


def test_what_cannot_be_recorded_says_why(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "select_kernels", lambda *_, **__: CudaKernels({}))
    one_by_one = Ranks(mixture, dtype="bfloat16")
    assert one_by_one.runners[0].cannot_record() == "experts' counts are wanted on the host (local)"
    one_by_one.close()
    monkeypatch.undo()
    plain = Ranks(mixture)
    assert plain.runners[0].cannot_record() == "attention asks for lengths on the host"
    plain.close()


_LLAMA_8B: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


_V3 = SHAPES["v3"] | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 32, "n_group": 8}


@pytest.mark.parametrize("raw", [_LLAMA_8B, _V3], ids=["llama", "v3"])
@pytest.mark.parametrize("prompts", [0, 2])
def test_a_step_of_real_size_asks_for_no_value(raw: dict[str, object], prompts: int) -> None:
    """On the meta device tensors have shapes alone: a step that waited for a number from the device would fail."""
    config, meta = parse_config(raw), torch.device("meta")
    shard = Shard(config, 0, 1, () if config.moe is None else tuple(range(32)))
    shapes = {name: parameter.shape for name, parameter in shard_parameters(shard).items()}

    def take(name: str) -> torch.Tensor | None:
        dtype = torch.float32 if ".gate." in name else torch.bfloat16
        return torch.empty(shapes[name], dtype=dtype, device=meta) if name in shapes else None

    kernels = CudaKernels({})
    kernels.groups_experts = True
    decoder = build_decoder(
        shard,
        take,
        kernels,
        SingleRank(),
        dispatch=None if config.moe is None else LocalDispatch(32),
        num_positions=4096,
        dtype=torch.bfloat16,
        device=meta,
    )
    cache = KVCache(decoder.cache_rows, 64, 16, dtype=torch.bfloat16, device=meta)
    parts = [(s, 1 if n >= prompts else 9) for n, s in enumerate(sequences(5, seed=1))]
    inputs: StepInputs = step_of([(sequence, count, 1) for sequence, count in parts])
    step = build_tensors(inputs, 16, dtype=torch.bfloat16, device=meta, ragged=decoder.ragged)
    logits = decoder.forward(step, cache)
    assert logits is not None
    assert (logits.shape, logits.dtype) == ((5, config.vocab_size), torch.float32)
