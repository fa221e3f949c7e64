"""Which collectives a layout gets, and what native libraries are told."""

from __future__ import annotations

import dataclasses
import os

import psutil
import pytest
from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]  # it comes from C++

from workers.parallel import groups, native, shm
from workers.parallel.collectives import SingleRank
from workers.parallel.groups import Groups
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

SETTINGS = EngineSettings(
    engine="e0",
    model_name="tiny",
    model_path="",
    plan=ParallelPlan(tensor=2),
    dtype="float32",
    device="cpu",
    max_model_len=64,
)
HERE = ("10.0.0.1", "10.0.0.1")


def test_one_rank_needs_nobody() -> None:
    settings = dataclasses.replace(SETTINGS, plan=ParallelPlan())
    joined = Groups.join(settings, 0, generation=1, store=("nowhere", 1), hosts={0: "10.0.0.1"})
    assert isinstance(joined.tensor, SingleRank)
    joined.close()


def test_nothing_is_left_of_a_meeting_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the next generation could not meet."""

    def met(*arguments: object, **options: object) -> None:
        distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)

    def broken(*arguments: object) -> None:
        raise RuntimeError("a peer went away")

    monkeypatch.setattr(groups, "_meet", lambda *arguments: None)
    monkeypatch.setattr(groups, "_initialise", met)
    monkeypatch.setattr(groups, "_tensor_collectives", broken)
    settings = dataclasses.replace(SETTINGS, collectives="gloo")
    for generation in (1, 2):
        with pytest.raises(RuntimeError, match="a peer went away"):
            Groups.join(settings, 0, generation=generation, store=("", 0), hosts={0: "127.0.0.1", 1: "127.0.0.1"})
        assert not distributed.is_initialized()


@pytest.mark.parametrize(
    ("changes", "hosts", "obstacle"),
    [
        ({}, HERE, None),
        ({"collectives": "shm"}, HERE, None),
        ({"collectives": "gloo"}, HERE, "as configured"),
        ({"device": "cuda"}, HERE, "as configured"),
        ({}, ("10.0.0.1", "10.0.0.2"), "ranks on several hosts"),
        ({"plan": ParallelPlan(data=2, tensor=2)}, HERE * 2, "shared memory serves one tensor group alone"),
    ],
)
def test_shared_memory_is_for_one_group_on_one_host(
    changes: dict[str, object], hosts: tuple[str, ...], obstacle: str | None
) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    assert groups._obstacle(settings, hosts) == obstacle


def test_a_rank_never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "library_path", lambda: None)
    assert shm.obstacle(2, "float32") == "shared memory is not compiled: run python -m workers.parallel.build"


def test_a_small_shared_memory_is_an_obstacle() -> None:
    reason = shm.obstacle(10**9, "float32")
    assert reason is not None
    assert "shared memory" in reason or "/dev/shm has" in reason


def test_ranks_that_wait_must_not_take_each_others_cores() -> None:
    num_cores = len(os.sched_getaffinity(0))
    assert shm.crowding(num_cores) is None
    assert shm.crowding(num_cores + 1) == f"{num_cores + 1} threads for {num_cores} cores"


@pytest.mark.parametrize(
    ("collectives", "obstacle", "kind"),
    [
        ("auto", None, "deepspeed shared memory"),
        ("auto", "ranks on several hosts", "gloo (ranks on several hosts)"),
        ("gloo", "as configured", "gloo"),
    ],
)
def test_a_fallback_says_why(collectives: str, obstacle: str | None, kind: str) -> None:
    settings = dataclasses.replace(SETTINGS, collectives=collectives)
    assert groups._kind(settings, "gloo", obstacle) == kind


def test_the_interface_of_an_address() -> None:
    loopback = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    )
    assert native.interface_of("127.0.0.1") == loopback
    assert native.interface_of("203.0.113.7") is None
