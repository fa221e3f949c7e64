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
from tests.hosts.ray_cluster import serving_on, shoal
from tests.hosts.ray_up import API_KEY, config, hosts_for_ray_up, ray_up

pytestmark = [needs_hosts, needs_sshd, pytest.mark.root, pytest.mark.timeout(300)]

NUM_NODES = 3
START_TIMEOUT_S = 15
LOOKING_S = 45.0  # what the doctor takes to find out why, at most


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


def serve_config(**options: int) -> str:
    return config(data=NUM_NODES, threads=len(os.sched_getaffinity(0)), **options)


def test_ray_up_then_serve_then_a_request(hosts: Hosts, model: Path) -> None:
    *nodes, operator = hosts
    with serving_on(nodes[0], model, serve_config()) as server:
        doors = [line.split()[-1] for line in server.output.splitlines() if line.strip().startswith("gRPC")]
        asked = operator.run(sys.executable, "-m", "tests.hosts.ask", doors[0], API_KEY, "A shoal is", "8")
        assert len(json.loads(asked.stdout)["tokens"]) == 8
        for host in nodes:
            assert len(host.processes("ray::RankActor")) == 1
            assert host.processes("raylet"), "a node of Ray's"
            assert host.outside(HOME / ".ray/auth_token").stat().st_mode & 0o077 == 0


def test_a_start_over_a_cut_link_ends_in_time_and_names_it(hosts: Hosts, model: Path) -> None:
    first, second, third = hosts[0], hosts[1], hosts[2]
    first.outside("/tmp/cut.yaml").write_text(serve_config(start_timeout_s=START_TIMEOUT_S))
    hosts.cut(second, third)
    began_s = time.monotonic()
    where = ("--address", "auto", "--model-path", str(model), "--config", "/tmp/cut.yaml")
    code, _, errors = shoal(first, "serve", *where, timeout_s=150)
    took_s = time.monotonic() - began_s
    hosts.heal()
    assert code == 1, errors
    assert f"not ready after {START_TIMEOUT_S} s (cluster.start_timeout_s)" in errors
    links = [line for line in errors.splitlines() if "link on " in line]
    assert links, errors
    assert all(second.name in line and third.name in line for line in links), "the cut one, and no other"
    assert took_s < START_TIMEOUT_S + LOOKING_S, errors
