"""What cannot be served through transformers is refused, with the reason, before a request is taken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoints import write_checkpoint
from tests.unit.workers.autotp.cases import checkpoint_of
from tests.unit.workers.ranks import settings_for
from workers.assemble import assemble
from workers.autotp import load
from workers.autotp.attention import Options, paged_attention
from workers.model import other_config
from workers.model.config import parse_config
from workers.parallel.collectives import SingleRank

MISTRAL = "mistral: a window"
_PHI3 = {
    "model_type": "phi3",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def _assemble(folder: Path, **changes: object) -> None:
    settings = settings_for(folder, **changes)
    assemble(settings, settings.plan.place(0), SingleRank())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"vision_config": {"hidden_size": 8}}, "vision_config: phi3 takes more than text"),
        ({"architectures": ["Phi3ForSequenceClassification"]}, "Phi3ForSequenceClassification is no causal"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: 'linear_attention' is not supported"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config is not supported"),
        ({"model_type": "falcon_mamba"}, "recurrent layers"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings must be"),
    ],
)
def test_what_config_json_tells(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as caught:
        parse_config(_PHI3 | changes)
    assert message in str(caught.value)


def test_sizes_are_read_under_other_names() -> None:
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    config = parse_config(gpt2)
    assert not config.native
    sizes = (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
    assert sizes == (768, 12, 12, 12, 64)
    assert (config.max_position_embeddings, config.intermediate_size) == (1024, 3072)
    assert parse_config(gpt2 | {"model_type": "gpt_bigcode", "multi_query": True}).num_kv_heads == 1


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    checkpoint_of(folder, MISTRAL)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "int8"}, "inference.quantization must be none"),
        ({"deterministic": True}, "inference.deterministic must be false"),
        ({"max_model_len": 129}, "inference.max_model_len 129 exceeds"),
        ({"memory_limit_bytes": 1000}, "the model's weights need"),
    ],
)
def test_settings_that_need_code_of_ours(mistral: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _assemble(mistral, **changes)


def test_a_model_type_that_transformers_does_not_know(mistral: Path, tmp_path: Path) -> None:
    raw = json.loads((mistral / "config.json").read_text()) | {"model_type": "novel"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((mistral / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="knows no model_type 'novel', and code that comes with a model is never run"):
        _assemble(tmp_path)


def test_a_checkpoint_with_a_hole(mistral: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((mistral / "config.json").read_bytes())
    weights = load_file(mistral / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        _assemble(tmp_path)


def test_a_model_that_attends_in_its_own_way(tmp_path: Path) -> None:
    import transformers

    config = transformers.BloomConfig(vocab_size=203, hidden_size=32, n_layer=1, n_head=4, seq_length=64)
    write_checkpoint(tmp_path, config)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="does not attend through transformers' attention interface"):
        _assemble(tmp_path)


def test_longrope_within_its_first_length_only(tmp_path: Path) -> None:
    import transformers

    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, **factors}
    config = transformers.Phi3Config(
        **_PHI3, rope_parameters=rope, original_max_position_embeddings=64, pad_token_id=None
    )
    write_checkpoint(tmp_path, config)
    _assemble(tmp_path, max_model_len=64)
    with pytest.raises(ValueError, match=r"longrope.*64 or less works"):
        _assemble(tmp_path, max_model_len=65)


def test_a_layer_that_keeps_its_window_to_itself(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(*arguments: Any, sliding_window: int | None = None, **others: Any) -> Any:
        return paged_attention(*arguments, **others)

    monkeypatch.setattr(load, "paged_attention", forgets)
    with pytest.raises(ValueError, match=r"layer 0 .* window of 12 tokens; inference\.max_model_len 12 or less works"):
        _assemble(mistral)
    _assemble(mistral, max_model_len=12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_comes_out_different(mistral: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The proof compares with transformers' own attention: a scale that is off by a third is found in any dtype."""

    def off(*arguments: Any, scaling: float = 1.0, **others: Any) -> Any:
        return paged_attention(*arguments, scaling=scaling / 1.5, **others)

    _assemble(mistral, dtype=dtype)
    monkeypatch.setattr(load, "paged_attention", off)
    with pytest.raises(ValueError, match="its logits differ from transformers' own by"):
        _assemble(mistral, dtype=dtype)


@dataclass
class _Cacheless:
    """A step of which attention asks nothing."""

    def attend(self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Any:
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not hand the cache down"),
        ({"paged": _Cacheless(), "attention_mask": torch.zeros(1)}, "a mask of its own"),
        ({"paged": _Cacheless(), "position_bias": torch.zeros(1)}, "position_bias"),
        ({"paged": _Cacheless(), "is_causal": False}, "still to come"),
    ],
)
def test_attention_that_our_cache_cannot_do(options: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        paged_attention(nn.Identity(), x, x, x, **options)


def test_without_transformers_the_remedy_is_named(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent: Callable[[str], None] = lambda name: None  # noqa: E731
    monkeypatch.setattr(other_config, "find_spec", absent)
    with pytest.raises(ValueError, match=r"pip install 'shoal\[transformers\]'"):
        _assemble(mistral)


def test_serving_a_native_model_imports_no_transformers() -> None:
    """It takes seconds and is not installed everywhere."""
    modules = "workers.rank, workers.assemble, cluster.app.run, cluster.engine.rank_actor, cluster.cli"
    code = f"import sys, {modules}; print([name for name in sys.modules if name.partition('.')[0] == 'transformers'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
