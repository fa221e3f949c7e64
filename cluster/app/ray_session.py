"""A Ray to run on: our own, on this machine and for this run alone, or a cluster that is there already."""

from __future__ import annotations

import logging
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.app import guard
from cluster.app.gcs_keeper import GcsKeeper, find_head
from cluster.app.names import NAMESPACE
from cluster.config.environment import has_ray_token, hurry_name_lookups, ray_auth_mode, set_variables

__all__ = ["RaySession", "join_ray", "start_ray", "visiting_ray"]

log = logging.getLogger(__name__)

# Ray takes 127.0.0.1 to mean "this machine from outside"; any other loopback address it leaves alone.
_LOOPBACK = "127.0.0.2"
_STORE = "gcs"  # below the folder: what Ray's head knows, for one that is started in its place
_RAY = "ray"  # Ray opens its folder to everybody: the one around it, with the token, stays private
_MAX_FOLDER_CHARS = 40  # Ray puts sockets below it, whose whole path may have 107
_OBJECT_STORE_BYTES = 80_000_000  # next to the least that Ray takes: nothing large passes through its store
_END_TIMEOUT_S = 5.0
_KNOCK_S = 5.0


@dataclass(slots=True)
class RaySession:
    """`folder` holds the logs, the sockets and the token of a Ray that is our own; None for one that we joined.

    `guard` is the process that cleans up after us if we are killed; `keeper` starts Ray's head again until `ending`.
    """

    folder: Path | None
    guard: subprocess.Popen[str] | None = None
    keeper: threading.Thread | None = None
    ending: threading.Event = field(default_factory=threading.Event)

    def end(self, *, keep_logs: bool = False) -> None:
        """Leaves Ray; of our own nothing remains, be it that it has to be killed."""
        import ray

        self.ending.set()
        if self.keeper is not None:
            self.keeper.join()
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
        self.ending.set()
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
    # Its head can be started again, and who is there waits for that.
    set_variables({"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / _STORE)})
    hurry_name_lookups()
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
    processes = psutil.Process().children(recursive=True)
    session = RaySession(folder, _start_guard(folder, processes))
    session.keeper = _start_keeper(session, processes)
    return session


def _start_keeper(session: RaySession, processes: Sequence[psutil.Process]) -> threading.Thread:
    import ray

    head, own_guard = find_head(processes), session.guard
    assert head is not None, "Ray has a head"
    assert own_guard is not None
    port = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    keeper = GcsKeeper(head, port, on_start=lambda pid: _tell(own_guard, pid))
    thread = threading.Thread(target=keeper.watch, args=(session.ending,), name="gcs-keeper", daemon=True)
    thread.start()
    return thread


def _start_guard(folder: Path, processes: Sequence[psutil.Process]) -> subprocess.Popen[str]:
    """In a session of its own, because Ctrl-C is sent to everything in ours."""
    script = Path(guard.__file__)
    process = subprocess.Popen(  # noqa: S603  # a script of ours
        [sys.executable, "-I", "-S", str(script), str(folder)], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    for child in processes:
        _tell(process, child.pid)
    return process


def _tell(own_guard: subprocess.Popen[str], pid: int) -> None:
    """Of a process that is not to outlive us."""
    assert own_guard.stdin is not None
    if started := guard.start_time(pid):
        own_guard.stdin.write(f"{pid} {started}\n")
        own_guard.stdin.flush()


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


@contextmanager
def visiting_ray(address: str) -> Iterator[None]:
    """Joined for a look. Raises ConnectionError in one line, before anything else.

    Ray tells its drivers of nodes that come and go on standard output: here that is standard error, since what a
    command prints is for scripts, too.
    """
    with redirect_stdout(sys.stderr):
        session = join_ray(address)
        try:
            yield
        finally:
            session.end()


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
