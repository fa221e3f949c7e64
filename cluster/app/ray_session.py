"""A Ray to run on: our own, on this machine and for this run alone, or a cluster that is there already."""

from __future__ import annotations

import logging
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.app import guard
from cluster.app.names import NAMESPACE
from cluster.config.environment import has_ray_token, ray_auth_mode, set_variables

__all__ = ["RaySession", "join_ray", "start_ray"]

log = logging.getLogger(__name__)

# Ray takes 127.0.0.1 to mean "this machine from outside"; any other loopback address it leaves alone.
_LOOPBACK = "127.0.0.2"
_RAY = "ray"  # Ray opens its folder to everybody: the one around it, with the token, stays private
_MAX_FOLDER_CHARS = 40  # Ray puts sockets below it, whose whole path may have 107
_OBJECT_STORE_BYTES = 80_000_000  # next to the least that Ray takes: nothing large passes through its store
_END_TIMEOUT_S = 5.0
_KNOCK_S = 5.0


@dataclass(slots=True)
class RaySession:
    """`folder` holds the logs, the sockets and the token of a Ray that is our own; None for one that we joined.

    `guard` is the process that cleans up after us if we are killed.
    """

    folder: Path | None
    guard: subprocess.Popen[str] | None = None

    def end(self, *, keep_logs: bool = False) -> None:
        """Leaves Ray; of our own nothing remains, be it that it has to be killed."""
        import ray

        started = psutil.Process().children(recursive=True) if self.folder is not None else []
        ray.shutdown()
        ours = [process for process in started if not self._guards(process)]
        _, alive = psutil.wait_procs(ours, timeout=_END_TIMEOUT_S)
        kill(alive)
        if self.folder is not None and not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.guard is not None:
            self.guard.communicate("done\n")

    def kill(self) -> None:
        """The same, at once; the guard does the rest."""
        if self.folder is not None:
            kill([child for child in psutil.Process().children(recursive=True) if not self._guards(child)])

    def _guards(self, process: psutil.Process) -> bool:
        return self.guard is not None and process.pid == self.guard.pid


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        if process.is_running():
            log.info("killing process %d, which did not end", process.pid)
            process.kill()
    psutil.wait_procs(processes, timeout=_END_TIMEOUT_S)


def start_ray(num_cpus: int, cores: int) -> RaySession:
    """Starts a Ray on loopback that only this user's processes with this run's token can speak to.

    `num_cpus` is what Ray may give away; more than `cores` where ranks share them.
    """
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    if len(str(folder)) > _MAX_FOLDER_CHARS:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="shoal-", dir="/tmp"))  # mkdtemp makes it private
    if ray_auth_mode() is None:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        set_variables({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    # Ray runs its workers at nice 15, behind everything else on the machine: ranks and front doors are what it is for.
    set_variables({"RAY_worker_niceness": "0"})
    _quieten()
    import ray

    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=max(num_cpus, cores),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address=_LOOPBACK,
        _temp_dir=str(folder / _RAY),
    )
    return RaySession(folder, _start_guard(folder))


def _start_guard(folder: Path) -> subprocess.Popen[str]:
    """In a session of its own, because Ctrl-C is sent to everything in ours."""
    processes = psutil.Process().children(recursive=True)
    script = Path(guard.__file__)
    process = subprocess.Popen(  # noqa: S603  # a script of ours
        [sys.executable, "-I", "-S", str(script), str(folder)], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    for child in processes:
        if started := guard.start_time(child.pid):
            process.stdin.write(f"{child.pid} {started}\n")
    process.stdin.flush()
    return process


def join_ray(address: str) -> RaySession:
    """Joins the cluster at `address`. Raises ConnectionError in one line."""
    _knock(address)
    _quieten()
    if ray_auth_mode() is None and has_ray_token():
        set_variables({"RAY_AUTH_MODE": "token"})  # a cluster that was started beside that token demands it
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"no Ray cluster that knows our token answers at {address}: {reason}") from None
    return RaySession(None)


def _knock(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody is there."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto": Ray knows whether one runs on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except OSError as error:
        reason = error.strerror or "no answer"
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({reason}); is its head up, and that its port?"
        ) from None


def _quieten() -> None:
    """Ray reads these when it is imported."""
    set_variables({"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"})
