"""What `shoal doctor` prints for scripts."""

from __future__ import annotations

import json

import pytest

import cluster.cli.doctor as command
import cluster.doctor.nodes
from cluster.app import ray_session
from cluster.doctor.finding import Finding


class _Session:
    def end(self) -> None:
        print("(raylet) The node has been marked dead")


def test_ray_does_not_speak_between(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It tells a driver of nodes that come and go, on standard output."""

    def join(address: str) -> _Session:
        print("(raylet) a node is back")
        return _Session()

    def examine(*wanted: object, **options: object) -> tuple[Finding, ...]:
        return ()

    monkeypatch.setattr(ray_session, "join_ray", join)
    monkeypatch.setattr(cluster.doctor.nodes, "examine_cluster", examine)
    with pytest.raises(SystemExit, match="0"):
        command.doctor(None, {("cluster", "address"): "auto"}, as_script=True, with_links=False, timeout_s=1.0)
    out, errors = capsys.readouterr()
    assert json.loads(out)["findings"] == []
    assert "a node is back" in errors
