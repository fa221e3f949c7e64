"""What `parallel: auto` makes of the family's models on the clusters that people rent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import parse
from cluster.config.machine import Machine, Node
from cluster.config.planning import Resolved, resolve_engine
from tests.unit.cluster.config.family import FAMILY, facts
from workers.model.sharding import check_plan

GB = 10**9
FP8 = {"quantization": "fp8"}


def nodes(count: int, gpus: int = 0, gpu_memory: int = 0, *, cores: int = 64, memory: int = 1000 * GB) -> Machine:
    """So many alike; `gpu_memory` in GB, as it is sold."""
    node = Node(cores=cores, memory_bytes=memory, free_bytes=memory, gpus=gpus, gpu_memory_bytes=gpu_memory * GB)
    return Machine(
        cores=cores,
        memory_bytes=memory,
        free_bytes=memory,
        gpus=count * gpus,
        fast_bfloat16=True,
        gpu_memory_bytes=gpu_memory * GB,
        nodes=(node,) * count,
    )


def plan(name: str, machine: Machine, inference: dict[str, Any] | None = None, **sections: Any) -> Resolved:
    document = {"parallel": "auto", "inference": inference or {}, **sections}
    return resolve_engine(parse(document), facts(name), machine)


@pytest.mark.parametrize(
    ("name", "machine", "inference", "expected"),
    [
        ("V2-Lite", nodes(1, 1, 40), {}, "data 1 x pipeline 1 x tensor 1"),
        ("V2-Lite", nodes(1, 1, 80), {}, "data 1 x pipeline 1 x tensor 1"),
        # Undivided attention leaves room for 130,000 tokens: not for a sequence of full length.
        ("V2-Lite", nodes(1, 2, 24), {}, "data 1 x pipeline 1 x tensor 2"),
        (
            "V2-Lite",
            nodes(1, 2, 24),
            {"max_batch_size": 32, "max_model_len": 32768},
            "data 2 x pipeline 1 x tensor 1 + 2 redundant experts",
        ),
        ("V2-Lite", nodes(1, 2, 40), {}, "data 2 x pipeline 1 x tensor 1 + 2 redundant experts"),
        ("V2-Lite", nodes(1, 2, 80), {}, "data 2 x pipeline 1 x tensor 1 + 2 redundant experts"),
        ("V2", nodes(1, 8, 80), {}, "data 2 x pipeline 1 x tensor 4"),
        ("V2", nodes(1, 8, 141), {}, "data 8 x pipeline 1 x tensor 1 + 8 redundant experts"),
        ("V3", nodes(2, 8, 80), FP8, "data 16 x pipeline 1 x tensor 1"),
        ("V3", nodes(1, 8, 141), FP8, "data 8 x pipeline 1 x tensor 1 + 8 redundant experts"),
        ("V3", nodes(4, 8, 80), FP8, "data 32 x pipeline 1 x tensor 1 + 32 redundant experts"),
        ("V3", nodes(4, 8, 80), {}, "data 16 x pipeline 1 x tensor 2"),
        ("Kimi-K2", nodes(2, 8, 141), FP8, "data 16 x pipeline 1 x tensor 1 + 16 redundant experts"),
        ("Kimi-K2", nodes(4, 8, 80), FP8, "data 32 x pipeline 1 x tensor 1 + 32 redundant experts"),
        ("Qwen-1.5B", nodes(1, 8, 80), {}, "data 8 x pipeline 1 x tensor 1"),
        ("Qwen-7B", nodes(1, 1, 24), {"max_model_len": 32768}, "data 1 x pipeline 1 x tensor 1"),
        ("Llama-8B", nodes(1, 2, 24), {}, "data 1 x pipeline 1 x tensor 2"),
        ("Qwen-14B", nodes(1, 8, 80), {}, "data 8 x pipeline 1 x tensor 1"),
        ("Qwen-32B", nodes(1, 8, 80), {}, "data 4 x pipeline 1 x tensor 2"),
        ("Llama-70B", nodes(1, 8, 80), {}, "data 2 x pipeline 1 x tensor 4"),
        ("Llama-70B", nodes(4, 1, 80), {}, "data 1 x pipeline 4 x tensor 1"),
        ("SmolLM2", nodes(1, cores=2, memory=24 * GB), {}, "data 1 x pipeline 1 x tensor 1"),
    ],
)
def test_the_family(name: str, machine: Machine, inference: dict[str, Any], expected: str) -> None:
    resolved = plan(name, machine, inference)
    assert str(resolved.plan) == expected
    assert resolved.reasons


def test_four_ranks_of_two_nodes_of_cpus() -> None:
    """Threads of a rank are given, so a node has room for two."""
    machine = nodes(2, cores=2, memory=64 * GB)
    resolved = plan("V2-Lite", machine, {"max_model_len": 4096}, resources={"cpu_threads": 1})
    assert str(resolved.plan) == "data 4 x pipeline 1 x tensor 1 + 4 redundant experts"
    assert str(plan("SmolLM2", machine).plan) == "data 2 x pipeline 1 x tensor 1"
    # Four copies do not fit 2 GB.
    small = plan("SmolLM2", nodes(1, cores=4, memory=2 * GB), {"max_batch_size": 1}, resources={"cpu_threads": 1})
    assert str(small.plan) == "data 1 x pipeline 1 x tensor 3"
    assert "1 of 4 ranks stay idle" in small.reasons


def test_slow_links_keep_experts_within_a_node() -> None:
    slow = {"cluster": {"network": {"links": "slow"}}}
    fits = plan("V3", nodes(2, 8, 141), FP8, **slow)
    assert fits.plan.data == 8
    assert any("cluster.engines: 2 would serve each node" in reason for reason in fits.reasons)
    assert str(plan("V3", nodes(2, 8, 80), FP8, **slow).plan) == "data 1 x pipeline 2 x tensor 8"
    assert str(plan("Qwen-7B", nodes(2, 8, 80), **slow).plan) == "data 16 x pipeline 1 x tensor 1"


def test_bits_that_must_not_depend_on_company_bound_tensor() -> None:
    for name in ("V2", "Llama-70B"):
        resolved = plan(name, nodes(1, 8, 80), {"deterministic": True})
        assert resolved.plan.tensor <= 2
        assert "inference.deterministic allows tensor 1 and 2 only" in resolved.reasons


@pytest.mark.parametrize(
    ("name", "machine", "inference", "message"),
    [
        (
            "V2-Lite",
            nodes(1, 1, 24),
            {},
            r"a rank needs 36\.8 GiB and has 22\.4 GiB .*int8 with .*; 2 nodes like this one",
        ),
        ("V3", nodes(1, 8, 80), FP8, r"what would fit: 2 nodes like this one; GPUs with 89\.\d GiB"),
        ("V3", nodes(1, 8, 141), {}, r"what would fit: inference\.quantization: fp8; "),
        ("Llama-70B", nodes(1, 2, 80), {}, r"inference\.max_model_len: 36496; inference\.quantization: int8"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    name: str, machine: Machine, inference: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(name, machine, inference)


@pytest.mark.parametrize(
    ("name", "parallel", "message"),
    [
        (
            "V3",
            {"tensor": 3, "data": "auto"},
            r"parallel\.tensor 3 must divide .*128 attention heads; sizes that work: 1, 2",
        ),
        ("V3", {"pipeline": 62, "data": "auto"}, r"parallel\.pipeline 62 exceeds the model's 61 layers; 61 or less"),
        ("V2-Lite", {"data": 65}, r"more ranks than the model has experts \(64\); data 64 or less would work"),
        (
            "V2-Lite",
            {"data": 2, "redundant_experts": 3},
            r"redundant_experts 3: .* by 2 ranks; 2 would work",
        ),
        ("V3", {"tensor": 8, "data": 3}, "needs 24 GPUs an engine, 16 were found"),
        (
            "V3",
            {"tensor": 16, "pipeline": 2, "data": "auto"},
            r"parallel\.pipeline 2 x parallel\.tensor 16 needs 32 GPUs",
        ),
        ("V3", {"tensor": 1}, r"not enough memory: with data 1 .*parallel: auto, which would take data 16"),
        ("V3", {"data": "auto", "redundant_experts": 3}, r"redundant_experts 3 .* parallel: auto would take data 16"),
        ("Llama-8B", {"data": "auto", "redundant_experts": 2}, r"parallel\.redundant_experts must be 0"),
    ],
)
def test_axes_that_cannot_be_are_refused(name: str, parallel: dict[str, Any], message: str) -> None:
    document = {"parallel": parallel, "inference": FP8 if name == "V3" else {}}
    with pytest.raises(ValueError, match=message):
        resolve_engine(parse(document), facts(name), nodes(2, 8, 80))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILY)),
    count=st.integers(1, 5),
    gpus=st.integers(0, 8),
    memory=st.integers(8, 200),
    engines=st.integers(1, 3),
    quantization=st.sampled_from(["none", "int8"]),
    deterministic=st.booleans(),
)
def test_what_is_planned_can_be_cut_and_fits(
    name: str, count: int, gpus: int, memory: int, engines: int, quantization: str, deterministic: bool
) -> None:
    machine = nodes(count, gpus, memory, memory=memory * 8 * GB)
    inference = {"quantization": quantization, "deterministic": deterministic, "max_model_len": 4096}
    try:
        resolved = plan(name, machine, inference, cluster={"engines": engines})
    except ValueError:
        return
    check_plan(facts(name).config, resolved.plan)
    assert resolved.memory is not None
    assert resolved.memory.left_bytes >= 0
    assert resolved.memory.cache_tokens >= 4096
    assert resolved.plan.tensor <= (2 if deterministic else 8)
    if gpus:
        assert resolved.plan.num_ranks * engines <= count * gpus
