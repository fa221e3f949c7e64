"""The first process of a test host: covers what hosts must not share, then collects the dead until it is killed.

Run as a script in fresh namespaces, with one JSON object as its argument; prints `up` when everything is mounted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _cover(folder: str, backing: str, kept: list[str]) -> None:
    """Puts `backing` in the place of `folder`; the `kept` paths below it stay visible."""
    os.makedirs(backing, exist_ok=True)
    for path in kept:
        if path.startswith(folder + "/"):
            target = backing + path.removeprefix(folder)
            if os.path.isdir(path):
                os.makedirs(target, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                open(target, "a").close()
            _mount("--rbind", path, target)
    _mount("--rbind", backing, folder)


def main() -> None:
    told = json.loads(sys.argv[1])
    os.chdir("/")
    socket.sethostname(told["name"])
    _mount("--bind", told["names_file"], "/etc/hosts")
    for folder, backing in told["covered"].items():
        _cover(folder, backing, told["kept"])
    os.chmod("/tmp", 0o1777)
    _mount("-t", "tmpfs", "-o", f"size={told['shared_memory_bytes']}", "tmpfs", "/dev/shm")
    _mount("-t", "tmpfs", "tmpfs", "/run")
    os.mkdir("/run/sshd")
    print("up", flush=True)
    # Blocked rather than ignored: orphans are reparented to this process and must be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigwait({signal.SIGCHLD})


if __name__ == "__main__":
    main()
