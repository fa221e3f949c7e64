"""A Ray cluster on hosts, started as an operator would by hand, and `shoal` on it."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.hosts.host import Host, HostProcess
from tests.integration.served import eventually

__all__ = [
    "PORT",
    "RAY_ENV",
    "give_token",
    "join",
    "keep_gcs",
    "kill_ray",
    "ray_cluster",
    "rejoin",
    "serving_on",
    "shoal",
    "start_head",
]

PORT = 6379
# As cluster/deploy/ray/node.env has it: a node that does not answer is given up after seconds instead of a minute, and
# a head that is started again is the same one.
RAY_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
_STORE_ENV = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/tmp/gcs"}
_HEAD_ENV = {
    **RAY_ENV,
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}
_STORE = "--object-store-memory=80000000"
_SHOAL = (sys.executable, "-c", "from cluster.cli import main; main()")
_START_TIMEOUT_S = 180.0


def give_token(*hosts: Host, token: str | None = None) -> str:
    """The same one for all."""
    token = token or secrets.token_hex(32)
    for host in hosts:
        host.write(".ray/auth_token", token)
    return token


def start_head(host: Host, *, num_cpus: int, store: Mapping[str, str] = _STORE_ENV) -> None:
    """`store` says where Ray keeps what its head knows."""
    address = f"--node-ip-address={host.address}"
    options = ("--include-dashboard=false", f"--num-cpus={num_cpus}", _STORE, address)
    host.run(
        "ray", "start", "--head", f"--port={PORT}", *options, env={**_HEAD_ENV, **store}, timeout_s=_START_TIMEOUT_S
    )


def join(host: Host, head: Host, *, num_cpus: int, env: Mapping[str, str] = RAY_ENV) -> None:
    options = (f"--num-cpus={num_cpus}", _STORE, f"--node-ip-address={host.address}")
    host.run("ray", "start", f"--address={head.address}:{PORT}", *options, env=env, timeout_s=_START_TIMEOUT_S)


def rejoin(host: Host, head: Host, *, num_cpus: int) -> None:
    """Of a host that was away. Ray ends where its head has given it up; what supervises services starts it again."""
    if not host.processes("raylet/raylet"):
        host.run("ray", "stop", "--force", check=False)
        join(host, head, num_cpus=num_cpus)


def keep_gcs(head: Host) -> HostProcess:
    """As node.env's function of that name."""
    return head.start(sys.executable, "-m", "cluster.app.gcs_keeper", str(PORT), env=RAY_ENV)


def kill_ray(host: Host) -> None:
    """SIGKILL to all of Ray's processes on a host and to what they run, but for a `shoal serve`."""
    for process in host.processes("ray"):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "shoal.yaml" not in process.cmdline()[-1] and process.pid != host.pid:
                process.kill()


@contextmanager
def ray_cluster(*hosts: Host, num_cpus: int = 2, on_head: int | None = None) -> Iterator[None]:
    """Of all `hosts`, the first one its head; stopped at the end."""
    give_token(*hosts)
    start_head(hosts[0], num_cpus=num_cpus if on_head is None else on_head)
    with ThreadPoolExecutor(len(hosts)) as pool:
        try:
            list(pool.map(lambda host: join(host, hosts[0], num_cpus=num_cpus), hosts[1:]))
            yield
        finally:
            list(pool.map(_stop, [host for host in hosts if host.alive]))


def _stop(host: Host) -> None:
    host.thaw()
    host.run("ray", "stop", "--force", check=False)


def shoal(host: Host, *arguments: str, timeout_s: float = 120.0) -> tuple[int, str, str]:
    """A command to its end: code, output, errors."""
    done = host.run(*_SHOAL, *arguments, env=RAY_ENV, timeout_s=timeout_s, check=False)
    return done.returncode, done.stdout, done.stderr


@contextmanager
def serving_on(host: Host, model: Path, config: str, *options: str) -> Iterator[HostProcess]:
    """`shoal serve` on the Ray cluster that `host` belongs to; ready when this begins, gone when it ends."""
    host.outside("/tmp/shoal.yaml").write_text(config)
    where = ("--address", "auto", "--model-path", str(model), "--config", "/tmp/shoal.yaml")
    command = (*_SHOAL, "serve", *where, *options)
    process = host.start(*command, env=RAY_ENV)
    try:
        eventually(
            lambda: "\nready after" in process.output or process.poll() is not None,
            "ready",
            timeout_s=_START_TIMEOUT_S,
        )
        assert process.poll() is None, process.output
        yield process
    finally:
        if process.poll() is None:
            process.send(signal.SIGTERM)
            process.wait(60)
        process.kill()
