"""What a run of test hosts leaves on the machine, and how it goes away whatever happens to the run.

Everything inside a host (processes, mounts, its end of the cable) belongs to its first process and ends with it, and
the kernel ends that one with its owner. A folder and a bridge remain: a watcher, this file run as a script, removes
them when its input ends, which is when the owner does. Should the watcher be killed too, the next run does it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "shoal-hosts-"
_NAME = re.compile(rf"{_PREFIX}(\d+)-(\d+)-(\d+)")
_BRIDGE = re.compile(r"shoal(\d+)-(\d+)")
_LOCK = Path(tempfile.gettempdir()) / "shoal-hosts.lock"
_INITS = "inits"
_KILL_TIMEOUT_S = 10.0


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Runs set up and clear away one after the other."""
    with _LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def start_time(pid: int) -> str:
    """When the process was started, which tells it from a later one of the same id; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def new_folder(number: int) -> Path:
    """A run's folder; its name says whose it is."""
    pid = os.getpid()
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{pid}-{start_time(pid)}-{number}"
    folder.mkdir(mode=0o700)
    return folder


def bridge_of(folder: Path) -> str:
    """The run's bridge; 15 characters are the most that the kernel takes."""
    found = _NAME.fullmatch(folder.name)
    assert found is not None, folder
    return f"shoal{found[1]}-{found[3]}"


def note_init(folder: Path, pid: int) -> None:
    """Remembers a host's first process."""
    with (folder / _INITS).open("a") as file:
        file.write(f"{pid} {start_time(pid)}\n")


def clear(folder: Path) -> None:
    """Ends the run's hosts and removes its bridge and folder. Safe to repeat."""
    _kill_inits(folder)
    _remove_bridge(bridge_of(folder))
    # Hosts mount the repository below their folders, in namespaces of their own. Should one of those mounts ever be
    # seen here, what is below must not be deleted.
    if str(folder) in Path("/proc/self/mountinfo").read_text():
        raise RuntimeError(f"{folder} has mounts; unmount them, then delete it")
    shutil.rmtree(folder, ignore_errors=True)


def reap() -> None:
    """Clears away what runs left whose owner is gone."""
    owned = set()
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        found = _NAME.fullmatch(folder.name)
        if found is None:
            continue
        if start_time(int(found[1])) == found[2]:
            owned.add(bridge_of(folder))
        else:
            clear(folder)
    for path in Path("/sys/class/net").glob("shoal*"):
        if _BRIDGE.fullmatch(path.name) and path.name not in owned:
            _remove_bridge(path.name)


def _kill_inits(folder: Path) -> None:
    try:
        lines = (folder / _INITS).read_text().splitlines()
    except OSError:
        return
    inits = [(int(pid), started) for pid, started in (line.split() for line in lines if " " in line)]
    for pid, started in inits:
        if start_time(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    give_up_s = time.monotonic() + _KILL_TIMEOUT_S
    while any(start_time(pid) == started for pid, started in inits) and time.monotonic() < give_up_s:
        time.sleep(0.02)


def _remove_bridge(name: str) -> None:
    if Path(f"/sys/class/net/{name}").exists():
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)


def main() -> None:
    """The watcher: its input is `done` and an end, or just an end."""
    if sys.stdin.read().strip() == "done":
        return
    with one_at_a_time():
        clear(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
