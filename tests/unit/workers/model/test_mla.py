"""Latent attention: the two ways to compute it agree, the cheaper one is taken, and the cache holds latents only."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.unit.workers.ranks import Sequence_, step_of
from workers.cache import KVCache
from workers.kernels.reference import ReferenceKernels
from workers.model.build_mla import build_latent_attention
from workers.model.config import ModelConfig, RopeConfig, parse_config
from workers.model.mla import LatentAttention, prefers_expanded, softmax_scale
from workers.model.mla_config import MLAConfig
from workers.model.parts import Parts
from workers.model.rope import rotary_table
from workers.model.sharding import Shard, shard_parameters
from workers.parallel.collectives import SingleRank
from workers.step import build_tensors
from workers.weights.random_checkpoint import SHAPES

BLOCK_SIZE = 4
_V3 = MLAConfig(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, interleaved=True)


def _config(**changes: object) -> ModelConfig:
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 5, "q_lora_rank": 20, "kv_lora_rank": 24}
    widths = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "vocab_size": 64}
    return parse_config({**SHAPES["v3-0.7b"], **sizes, **widths, **changes})


def _attention(config: ModelConfig, expands: Callable[[MLAConfig, int, int], bool]) -> LatentAttention:
    shard = Shard(config, 0, 1)
    generator = torch.Generator().manual_seed(7)
    parameters = shard_parameters(shard)
    values = {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in parameters.items()}
    return build_latent_attention(
        Parts(shard, values.get, ReferenceKernels(), SingleRank()), "layers.0", expands=expands
    )


def _run(attention: LatentAttention, config: ModelConfig, x: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    cache = KVCache([attention.cache_row], 32, BLOCK_SIZE, dtype=x.dtype, device=x.device)
    rotary = rotary_table(config.rope, config.head_dim, 64, dtype=x.dtype, device=x.device)
    sequence = Sequence_([0] * len(x), [9, 2, 30, 4, 11, 17, 0, 5, 21, 8])
    parts = []
    for count in counts:
        step = build_tensors(step_of([(sequence, count, count)]), BLOCK_SIZE, dtype=x.dtype, device=x.device)
        rows = x[sequence.num_computed : sequence.num_computed + count].clone()
        parts.append(attention(rows, rotary.rows(step.positions), step, cache.layers[0]))
        sequence.num_computed += count
    return torch.cat(parts)


@pytest.mark.parametrize("q_rank", [20, None])
def test_absorbed_expanded_and_chunked_agree(q_rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(q_lora_rank=q_rank)
    x = torch.randn(33, config.hidden_size, generator=torch.Generator().manual_seed(1))
    expanded = _attention(config, lambda *_: True)
    absorbed = _attention(config, lambda *_: False)
    whole = _run(expanded, config, x, (33,))
    assert float((whole - x).abs().max()) > 0.5, "attention that adds nothing proves nothing"
    for attention in (expanded, absorbed):
        for counts in ((33,), (5, 1, 20, 1, 6), (1,) * 33):
            torch.testing.assert_close(_run(attention, config, x, counts), whole, atol=2e-5, rtol=2e-5)
    monkeypatch.setattr("workers.model.mla._EXPANDED_BYTES", 33 * (20 + 10) * 4 * 2)  # two heads at a time, of five
    torch.testing.assert_close(_run(expanded, config, x, (33,)), whole, atol=2e-5, rtol=2e-5)


def test_the_cheaper_form_is_taken() -> None:
    assert not prefers_expanded(_V3, 1, 10_000)
    assert not prefers_expanded(_V3, 100, 10_000)
    assert prefers_expanded(_V3, 2048, 10_000)
    for num_tokens in (2, 64, 4096):
        assert prefers_expanded(_V3, num_tokens, num_tokens), "a prompt's first chunk expands only what it needs anyway"
    # With a long context the two cost the same at kv_rank * (nope + v) / (what a score costs more) tokens.
    even = 512 * 256 / ((576 + 512) - (192 + 128))
    assert not prefers_expanded(_V3, int(even), 10_000_000)
    assert prefers_expanded(_V3, int(even) + 2, 10_000_000)


def test_the_scale_is_sharpened_for_a_stretched_context() -> None:
    plain = 1 / math.sqrt(192)
    assert softmax_scale(_V3, RopeConfig()) == pytest.approx(plain)
    yarn = RopeConfig(type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0)
    assert softmax_scale(_V3, yarn) == pytest.approx(plain * (0.1 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize(("shape", "kilobytes"), [("v2-lite", 31.1), ("v3", 70.3)])
def test_the_cache_holds_latents_only(shape: str, kilobytes: float) -> None:
    config = parse_config(SHAPES[shape])
    shard = Shard(config, 0, 4)
    assert round(shard.cache_row * config.num_layers * 2 / 1000, 1) == kilobytes
    v2 = parse_config({**SHAPES["v3"], "num_hidden_layers": 60})
    assert round(Shard(v2, 0, 1).cache_row * 60 * 2 / 1000, 1) == 69.1


def test_the_attention_keeps_what_the_shard_says() -> None:
    config = _config()
    assert _attention(config, prefers_expanded).cache_row == Shard(config, 0, 1).cache_row == 32
