"""`ray up local.yaml` onto hosts, by an operator on another one: as cluster/deploy/README.md tells it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.hosts.harness import Hosts, make_hosts
from tests.hosts.host import HOME, ROOT, Host
from tests.hosts.ray_cluster import give_token
from tests.hosts.ssh import KEY, open_ssh

__all__ = ["API_KEY", "config", "hosts_for_ray_up", "ray_up"]

API_KEY = "a-key-for-tests"
_PORT, _HTTP_PORT = 19000, 18000


def config(*, data: int, threads: int, start_timeout_s: int = 180) -> str:
    """With as many threads a rank as a host has cores, no host has room for two."""
    doors = f"host: 0.0.0.0, port: {_PORT}, http_port: {_HTTP_PORT}, start_timeout_s: {start_timeout_s}"
    return f"""
parallel: {{data: {data}}}
inference: {{max_model_len: 512}}
resources: {{cache_size: 16MiB, cpu_threads: {threads}}}
security: {{api_key: {API_KEY}}}
cluster: {{{doors}}}
"""


@contextmanager
def hosts_for_ray_up(count: int, model: Path, keys: Path) -> Iterator[Hosts]:
    """`count` that may become a cluster, and behind them one for the operator; `keys` is a folder for SSH keys."""
    with make_hosts(count + 1, shared=[model]) as made:
        open_ssh(made, keys, tuple(made)[:count])
        # Where this checkout is, instead of /opt/shoal.
        for host in made:
            host.write(".bashrc", f"export SHOAL_VENV={sys.prefix} PYTHONPATH={ROOT}\n")
        give_token(made[count])
        yield made


def ray_up(operator: Host, nodes: Sequence[Host], *, timeout_s: float = 180.0) -> None:
    """The first of `nodes` becomes the head. From the repository's root, as the file says."""
    document = yaml.safe_load((ROOT / "cluster/deploy/ray/local.yaml").read_text())
    head, *workers = nodes
    document["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
    document["auth"] = {"ssh_user": "root", "ssh_private_key": str(HOME / KEY)}
    operator.write("local.yaml", yaml.safe_dump(document))
    operator.run("sh", "-c", f"cd {ROOT} && ray up -y --no-config-cache {HOME}/local.yaml", timeout_s=timeout_s)
