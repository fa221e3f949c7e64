"""What "auto" becomes on which machine, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError, parse
from cluster.config.machine import Machine, Node, this_machine
from cluster.config.resolve import check_exposure, engine_settings
from cluster.models.folder import ModelFacts
from tests.unit.cluster.config.family import facts
from workers.model.config import parse_config
from workers.settings import EngineSettings

GIB = 1024**3
CPU = Machine(cores=8, memory_bytes=16 * GIB, free_bytes=12 * GIB, gpus=0, fast_bfloat16=True)
GPU = replace(CPU, gpus=4, gpu_memory_bytes=24 * GIB)
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}
MODEL = ModelFacts(config=parse_config(_LLAMA), weight_bytes=0)


def resolve(document: dict[str, Any], machine: Machine = CPU, model: ModelFacts = MODEL) -> EngineSettings:
    return engine_settings(parse(document), model, machine, name="m", folder=Path("/m"))


def test_defaults_on_a_cpu() -> None:
    settings = resolve({})
    assert settings.device == "cpu"
    assert settings.dtype == "bfloat16"
    assert settings.num_threads == 8
    assert settings.max_model_len == 2048
    assert settings.memory_limit_bytes == int(16 * GIB * 0.8)
    assert settings.cache_bytes is None


def test_no_value_stays_auto() -> None:
    document = {"parallel": "auto", "inference": {"dtype": "auto"}, "resources": {"cache_size": "auto"}}
    for machine in (CPU, GPU):
        settings = resolve(document, machine)
        named = {name: getattr(settings, name) for name in settings.__slots__ if name != "collectives"}
        assert "auto" not in named.values()


@pytest.mark.parametrize(
    ("machine", "checkpoint", "expected"),
    [
        (CPU, "bfloat16", "bfloat16"),
        (CPU, "float32", "float32"),
        (CPU, "float16", "bfloat16"),
        (replace(CPU, fast_bfloat16=False), "bfloat16", "float32"),
        (GPU, "float16", "float16"),
        (GPU, "float8_e4m3fn", "bfloat16"),
    ],
)
def test_dtype_follows_checkpoint_and_hardware(machine: Machine, checkpoint: str, expected: str) -> None:
    model = replace(MODEL, config=replace(MODEL.config, dtype=checkpoint))
    assert resolve({}, machine, model).dtype == expected


def test_threads_and_memory_are_shared_by_the_ranks_of_a_machine() -> None:
    settings = resolve({"parallel": {"tensor": 2}, "cluster": {"engines": 2}})
    assert settings.num_threads == 2
    assert settings.memory_limit_bytes == int(16 * GIB * 0.8) // 4
    assert resolve({"parallel": {"tensor": 6}, "cluster": {"engines": 2}}).num_threads == 1


def test_auto_gives_engines_their_part_of_the_gpus() -> None:
    assert str(resolve({"parallel": "auto"}, GPU).plan) == "data 4 x pipeline 1 x tensor 1"
    assert resolve({"parallel": "auto", "cluster": {"engines": 2}}, GPU).plan.data == 2
    assert resolve({"parallel": "auto"}, CPU).plan.num_ranks == 1


def test_axes_that_are_given_stay() -> None:
    partly = resolve({"parallel": {"tensor": 2, "data": "auto"}}, GPU)
    assert str(partly.plan) == "data 2 x pipeline 1 x tensor 2"
    assert "tensor 2: as configured" in partly.plan_reasons
    assert resolve({"parallel": {"tensor": 2}}, GPU).plan_reasons == ()


def test_memory_of_gpus_that_nobody_knows_must_be_given() -> None:
    unknown = replace(GPU, gpu_memory_bytes=None)
    assert resolve({"parallel": {"tensor": 2}}, unknown).plan.tensor == 2
    with pytest.raises(ConfigError, match=r"resources\.gpu_memory: 80GB"):
        resolve({"parallel": "auto"}, unknown)
    assert resolve({"parallel": "auto", "resources": {"gpu_memory": "80GB"}}, unknown).plan.data == 4


def test_folders_for_records_do_not_depend_on_where_ranks_run() -> None:
    settings = resolve({"scheduling": {"record_steps": "steps"}})
    assert settings.record_steps == str(Path("steps").absolute())


def test_experts_may_move_and_be_recorded_with_stages() -> None:
    document = {
        "parallel": {"pipeline": 2, "data": 2},
        "inference": {"expert_balance": {"interval_s": 5}, "record_routing": "routing"},
    }
    settings = resolve(document, replace(GPU, gpu_memory_bytes=80 * GIB), facts("V2-Lite"))
    assert settings.expert_balance is not None
    assert settings.record_routing == str(Path("routing").absolute())


def test_sizes_are_read() -> None:
    settings = resolve({"resources": {"memory_limit": "4GiB", "cache_size": "512 MB"}})
    assert settings.memory_limit_bytes == 4 * GIB
    assert settings.cache_bytes == 512_000_000


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"parallel": {"tensor": 5}}, r"parallel.tensor 5 must divide the model's 12 attention heads.*1, 2, 3, 6"),
        (
            {"parallel": {"pipeline": 99}},
            r"parallel.pipeline 99 exceeds the model's \d+ layers; \d+ or less would work",
        ),
        ({"inference": {"max_model_len": 4096}}, "inference.max_model_len: 4096 is beyond the model's 2048"),
        ({"parallel": {"data": 2, "redundant_experts": 2}}, "parallel.redundant_experts must be 0"),
        (
            {"parallel": {"tensor": 3}, "inference": {"deterministic": True}},
            r"parallel.tensor 3: inference.deterministic takes 1 or 2",
        ),
        ({"inference": {"quantization": "fp8"}}, "inference.quantization: fp8 needs a checkpoint in FP8"),
        ({"inference": {"device_map": "cuda"}}, "inference.device_map: cuda asked for, but no GPU"),
        ({"resources": {"gpus": 1}}, "resources.gpus: 1 asked for, 0 found"),
        ({"resources": {"memory_limit": "101%"}}, "resources.memory_limit: '101%' must be"),
        ({"resources": {"memory_limit": "lots"}}, "resources.memory_limit: 'lots' is not a size"),
        ({"resources": {"cache_size": "-1GiB"}}, "resources.cache_size: '-1GiB' is not a size"),
    ],
)
def test_what_cannot_be_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(document)


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs 6 GPUs an engine, 4 were found in all"):
        resolve({"parallel": {"tensor": 6}}, GPU)


def test_weights_that_cannot_fit_say_how_much_is_needed_and_what_would_fit() -> None:
    eight = parse_config({**_LLAMA, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 4})
    model = ModelFacts(config=eight, weight_bytes=0)  # about 1.1 GiB in bfloat16
    with pytest.raises(
        ConfigError, match=r"not enough memory: .* a rank needs .* has 512\.0 MiB .* cluster\.engines: 1"
    ):
        resolve({"resources": {"memory_limit": "2GiB"}, "cluster": {"engines": 4}}, CPU, model)
    with pytest.raises(ConfigError, match=r"has 1\.5 GiB .* inference\.dtype: bfloat16"):
        resolve({"resources": {"memory_limit": "1.5GiB"}, "inference": {"dtype": "float32"}}, CPU, model)


def test_ranks_of_several_nodes_have_the_cores_of_theirs() -> None:
    node = Node(cores=8, memory_bytes=16 * GIB, free_bytes=12 * GIB)
    settings = resolve({"parallel": "auto"}, replace(CPU, nodes=(node, node)))
    assert settings.plan.data == 2
    assert settings.num_threads == 8
    assert settings.memory_limit_bytes == int(16 * GIB * 0.8)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(parse({"cluster": {"host": host}}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_strangers_need_a_key_or_a_statement(host: str) -> None:
    document: dict[str, Any] = {"cluster": {"host": host}}
    with pytest.raises(ConfigError, match=r"set security\.api_key, or state security\.insecure: true"):
        check_exposure(parse(document))
    check_exposure(parse({**document, "security": {"insecure": True}}))
    check_exposure(parse({**document, "security": {"api_key": "long-enough"}}))


def test_this_machine_has_something() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert 0 < machine.free_bytes <= machine.memory_bytes
