"""What a routing log writes is what the layers chose."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from scheduler.experts_replay import read_recording
from workers.parallel.dispatch import Routing
from workers.routing_log import RoutingLog


def _routing(tokens: int) -> Routing:
    return Routing(torch.randint(0, 300, (tokens, 3)).sort().values, torch.ones(tokens, 3))


def test_every_complete_step_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    log = RoutingLog(tmp_path / "new", "r0", generation=1, layers=(2, 5), num_experts=300, tokens_per_file=10)
    log.record(5, _routing(4))  # the second half of a step that was under way
    expected = torch.zeros(2, 300, dtype=torch.int64)
    for tokens in (4, 1, 7, 2):
        for row, layer in enumerate((2, 5)):
            routing = _routing(tokens)
            expected[row] += torch.bincount(routing.expert_ids.flatten(), minlength=300)
            log.record(layer, routing)
    log.record(2, _routing(3))
    log.close()
    assert len(list((tmp_path / "new").iterdir())) == 2
    recording = read_recording(tmp_path / "new")
    assert recording.layers == (2, 5)
    (stage,) = recording.stages
    assert sum(stage.parts).tolist() == expected.tolist()  # type: ignore[union-attr]


def test_a_quiet_rank_writes_what_it_has(tmp_path: Path) -> None:
    """So that little is lost with it."""
    log = RoutingLog(tmp_path, "r0", generation=1, layers=(0,), num_experts=300, write_every_s=0.01)
    log.record(0, _routing(3))
    deadline_s = time.monotonic() + 10
    while not list(tmp_path.glob("*.npz")):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert read_recording(tmp_path).num_choices == 9
    log.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_ends_the_recording_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gone"
    log = RoutingLog(folder, "r0", generation=1, layers=(0,), num_experts=300, tokens_per_file=1)
    folder.rmdir()
    log.record(0, _routing(2))
    log.record(0, _routing(2))
    log.close()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
