"""`ray up local.yaml` onto two hosts, `shoal serve` on them, a request from a third: what an operator does."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.checkpoints import tiny_deepseek
from tests.hosts import Hosts, make_hosts, needs_hosts, needs_sshd
from tests.hosts.host import HOME, ROOT
from tests.hosts.ray_cluster import give_token, serving_on
from tests.hosts.ssh import KEY, open_ssh

pytestmark = [needs_hosts, needs_sshd, pytest.mark.root, pytest.mark.timeout(300)]

PORT, HTTP_PORT = 19000, 18000
API_KEY = "a-key-for-tests"


def config(threads: int) -> str:
    """With as many threads a rank as a host has cores, no host has room for both."""
    return f"""
parallel: {{data: 2}}
inference: {{max_model_len: 512}}
resources: {{cache_size: 16MiB, cpu_threads: {threads}}}
security: {{api_key: {API_KEY}}}
cluster: {{host: 0.0.0.0, port: {PORT}, http_port: {HTTP_PORT}}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def hosts(model: Path, tmp_path: Path) -> Iterator[Hosts]:
    with make_hosts(3, shared=[model]) as made:
        open_ssh(made, tmp_path, (made[0], made[1]))
        # Where this checkout is, instead of /opt/shoal.
        for host in made:
            host.write(".bashrc", f"export SHOAL_VENV={sys.prefix} PYTHONPATH={ROOT}\n")
        give_token(made[2])
        yield made


def test_ray_up_then_serve_then_a_request(hosts: Hosts, model: Path) -> None:
    head, worker, admin = hosts
    document = yaml.safe_load((ROOT / "cluster/deploy/ray/local.yaml").read_text())
    document["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
    document["auth"] = {"ssh_user": "root", "ssh_private_key": str(HOME / KEY)}
    admin.write("local.yaml", yaml.safe_dump(document))
    began_s = time.monotonic()
    # From the repository's root, as the file says.
    admin.run("sh", "-c", f"cd {ROOT} && ray up -y --no-config-cache {HOME}/local.yaml", timeout_s=180)
    up_s = time.monotonic() - began_s
    with serving_on(head, model, config(len(os.sched_getaffinity(0)))) as server:
        ready_s = time.monotonic() - began_s
        doors = [line.split()[-1] for line in server.output.splitlines() if line.strip().startswith("gRPC")]
        asked = admin.run(sys.executable, "-m", "tests.hosts.ask", doors[0], API_KEY, "A shoal is", "8")
        answer = json.loads(asked.stdout)
        assert len(answer["tokens"]) == 8
        first_s = time.monotonic() - began_s
        print(f"\nray up {up_s:.1f} s, ready {ready_s:.1f} s, first answer {first_s:.1f} s after ray up began")
        for host in (head, worker):
            assert len(host.processes("ray::RankActor")) == 1
            assert host.processes("raylet"), "a node of Ray's"
            assert host.outside(HOME / ".ray/auth_token").stat().st_mode & 0o077 == 0
