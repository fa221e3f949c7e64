"""Which exchange a layout gets, and what it says of itself."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest

from tests.unit.workers.parallel.host_exchanges import MemoryBoard
from tests.unit.workers.thread_exchange import on_threads
from workers.parallel import exchange_choice
from workers.parallel.exchange import Exchange
from workers.parallel.exchange_choice import join_exchange
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

SETTINGS = EngineSettings(
    engine="e0",
    model_name="tiny",
    model_path="",
    plan=ParallelPlan(data=2),
    dtype="float32",
    device="cpu",
    max_model_len=64,
)
HERE = ("10.0.0.1", "10.0.0.1")


def _kinds(changes: dict[str, object], hosts: tuple[str, str]) -> set[str]:
    """What the two ranks get."""
    settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    board = MemoryBoard()

    def join(rank: int) -> str:
        exchange: Exchange = join_exchange(
            settings, rank, (0, 1), hosts, board, group=None, generation=1, join_timeout_s=5, step_timeout_s=1
        )
        exchange.close()
        return exchange.kind

    return set(on_threads(2, join))


@pytest.mark.parametrize(
    ("changes", "hosts", "kind"),
    [
        ({}, HERE, "shared memory"),
        ({"collectives": "gloo"}, HERE, "gloo"),
        ({"device": "cuda"}, HERE, "nccl"),
        ({}, ("10.0.0.1", "10.0.0.2"), "gloo (ranks on several hosts)"),
    ],
)
def test_memory_serves_one_host(changes: dict[str, object], hosts: tuple[str, str], kind: str) -> None:
    assert _kinds(changes, hosts) == {kind}


def test_a_fallback_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def meet(*_: Any, **__: Any) -> str:
        return "rank 1 cannot share: No space left on device"

    monkeypatch.setattr(exchange_choice, "meet", meet)
    kind = "gloo (rank 1 cannot share: No space left on device)"
    assert _kinds({}, HERE) == {kind}
    warned = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert warned == {f"rank {rank}: experts are reached over {kind}" for rank in (0, 1)}
