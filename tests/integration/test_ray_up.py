"""`ray up local.yaml` onto three hosts, `shoal serve` on them, a request from a fourth: what an operator does."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import tiny_deepseek
from tests.hosts import Hosts, needs_hosts, needs_sshd
from tests.hosts.host import HOME
from tests.hosts.ray_cluster import serving_on
from tests.hosts.ray_up import API_KEY, config, hosts_for_ray_up, ray_up
from tests.integration.served import eventually

pytestmark = [needs_hosts, needs_sshd, pytest.mark.root, pytest.mark.timeout(300)]

NUM_NODES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def hosts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """The last is the operator's; the others are a Ray cluster."""
    with hosts_for_ray_up(NUM_NODES, model, tmp_path_factory.mktemp("keys")) as made:
        *nodes, operator = made
        began_s = time.monotonic()
        ray_up(operator, nodes)
        print(f"\nray up on {NUM_NODES} hosts: {time.monotonic() - began_s:.1f} s")
        yield made


def test_somebody_watches_over_the_head(hosts: Hosts) -> None:
    head = hosts[0]
    log = head.outside(HOME / ".shoal/gcs-keeper.log")
    eventually(
        lambda: "watching over the GCS" in log.read_text(), "the keeper runs, and finds that the head keeps its state"
    )
    assert head.outside(HOME / ".shoal/gcs").is_dir()


def test_ray_up_then_serve_then_a_request(hosts: Hosts, model: Path) -> None:
    *nodes, operator = hosts
    with serving_on(nodes[0], model, config(data=NUM_NODES, threads=len(os.sched_getaffinity(0)))) as server:
        doors = [line.split()[-1] for line in server.output.splitlines() if line.strip().startswith("gRPC")]
        asked = operator.run(sys.executable, "-m", "tests.hosts.ask", doors[0], API_KEY, "A shoal is", "8")
        assert len(json.loads(asked.stdout)["tokens"]) == 8
        for host in nodes:
            assert len(host.processes("ray::RankActor")) == 1
            assert host.processes("raylet"), "a node of Ray's"
            assert host.outside(HOME / ".ray/auth_token").stat().st_mode & 0o077 == 0
