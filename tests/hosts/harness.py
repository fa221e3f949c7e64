"""Several hosts on one machine, each with its own address, processes, /tmp, /dev/shm, HOME and name."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.hosts import leftovers
from tests.hosts.host import Host
from tests.hosts.network import Network

__all__ = ["Hosts", "make_hosts", "needs_hosts", "needs_sshd", "obstacle"]

_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}
_numbers = itertools.count()


@cache
def obstacle() -> str | None:
    """Why no hosts can be made here, or None."""
    if os.getuid() != 0:
        return "hosts need root"
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return f"hosts need {', '.join(missing)}"
    trial = ["unshare", "--fork", "--pid", "--net", "--mount", "--uts", "--ipc", "ip", "link", "add", "type", "veth"]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


_OBSTACLE = obstacle()
needs_hosts = pytest.mark.skipif(_OBSTACLE is not None, reason=str(_OBSTACLE))
needs_sshd = pytest.mark.skipif(
    any(shutil.which(tool, path="/usr/sbin:/usr/bin") is None for tool in ("sshd", "rsync")),
    reason="`ray up` needs openssh-server and rsync",
)


class Hosts(Sequence[Host]):
    """Running hosts, `host-1` first. What is broken stays so until `heal`, or until the host boots again."""

    def __init__(self, folder: Path, count: int, shared: Sequence[Path], *, default_route: bool) -> None:
        self._shared = tuple(shared)
        self._default_route = default_route
        self.network = Network(leftovers.bridge_of(folder))
        names_file = folder / "hosts"
        self._folder = folder
        self._hosts = [
            Host(f"host-{number}", address, folder / f"host-{number}", names_file)
            for number, address in enumerate(self.network.addresses[:count], start=1)
        ]
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self._hosts)]
        names_file.write_text("\n".join(lines) + "\n")
        for host in self._hosts:
            host.folder.mkdir()
            self.boot(host)

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: int) -> Host:  # type: ignore[override]  # no slices
        return self._hosts[index]

    def boot(self, host: Host) -> None:
        """Starts a host, or one that was killed again: /tmp and HOME are as they were."""
        host.boot(self._shared)
        leftovers.note_init(self._folder, host.pid)
        self.network.forget(host)
        self.network.plug(host, default_route=self._default_route)

    def cut(self, first: Host, second: Host | None = None) -> None:
        """Between two hosts, both ways; of one host its cable, from everybody and from this machine."""
        if second is None:
            self.network.cut(first)
        else:
            self.cut_one_way(first, second)
            self.cut_one_way(second, first)

    def cut_one_way(self, sender: Host, receiver: Host) -> None:
        """What `sender` sends does not arrive any more; what `receiver` sends does."""
        self.network.lose(sender, receiver.address)

    def slow(self, host: Host, bits_per_s: int) -> None:
        """Its cable carries no more, either way."""
        self.network.slow(host, bits_per_s)

    def freeze(self, host: Host) -> None:
        host.freeze()

    def kill(self, host: Host) -> None:
        """As if its power went: no connection is closed, no goodbye is said."""
        self.network.cut(host)
        host.power_off()

    def heal(self, host: Host | None = None) -> None:
        """Cables as they were, and no process is stopped; of one host, or of all."""
        self.network.heal(host)
        for one in self._hosts:
            if one.alive and host in (None, one):
                one.thaw()

    def end(self) -> None:
        for host in self._hosts:
            host.power_off()


@contextmanager
def make_hosts(count: int = 2, *, shared: Sequence[Path] = (), default_route: bool = True) -> Iterator[Hosts]:
    """Hosts for the length of a test, or of a module; use it from the main thread, with which they end.

    They see the whole machine, read and write, but for /tmp, HOME, /dev/shm and /run; below the first two they see the
    repository, the Python that runs and `shared`. Without `default_route` they know the way to each other only.
    """
    with leftovers.one_at_a_time():
        leftovers.reap()
        folder = leftovers.new_folder(next(_numbers))
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", leftovers.__file__, str(folder)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            hosts = Hosts(folder, count, shared, default_route=default_route)
        except BaseException:
            leftovers.clear(folder)
            watcher.communicate("done")
            raise
    try:
        yield hosts
    finally:
        hosts.end()
        with leftovers.one_at_a_time():
            leftovers.clear(folder)
        watcher.communicate("done")
