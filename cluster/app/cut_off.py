"""Cuts this node, or one process of it, off from the others on purpose. Run as a script of its own, like `disturb`:

    python -m cluster.app.cut_off DURATION_S node ADDRESS...        from the hosts with these addresses, both ways
    python -m cluster.app.cut_off DURATION_S process PID START      what goes over its connections, and to its ports

Ends with 1 and the reason on standard error where the node's packet filter (nftables) cannot be had: it needs `nft` and
CAP_NET_ADMIN. Packets are dropped, so nobody is told. What is dropped is in sets whose elements the kernel forgets by
itself: the cut ends even if this script is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from cluster.app.disturb import FIRST_S, go_on_alone
from cluster.app.guard import start_time

__all__ = ["sockets"]

_LOOK_S = 0.1  # for connections that the process makes meanwhile
_LISTENS = "0A"  # as /proc/net/tcp has it
_NFT_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

_NODE = """
    set hosts4 {{ type ipv4_addr; flags timeout; }}
    set hosts6 {{ type ipv6_addr; flags timeout; }}
    chain arriving {{ type filter hook input priority -300; ip saddr @hosts4 drop; ip6 saddr @hosts6 drop; }}
    chain leaving {{ type filter hook output priority -300; ip daddr @hosts4 drop; ip6 daddr @hosts6 drop; }}
"""
# Of a process: its port and the other one of each connection, and the ports at which nobody else listens, too.
_PROCESS = """
    set links {{ type inet_service . inet_service; flags timeout; }}
    set ports {{ type inet_service; flags timeout; }}
    chain arriving {{
        type filter hook input priority -300;
        tcp dport . tcp sport @links drop
        tcp dport @ports tcp flags & (syn | ack) == syn drop
    }}
    chain leaving {{ type filter hook output priority -300; tcp sport . tcp dport @links drop; }}
"""


def sockets(pid: int) -> tuple[set[tuple[int, int]], set[int]]:
    """A process's TCP connections as (its port, the other's), and the ports at which only it listens."""
    own: set[str] = set()
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            try:
                own.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            except OSError:
                continue  # closed meanwhile
    except OSError:
        return set(), set()
    links: set[tuple[int, int]] = set()
    listening: dict[int, set[bool]] = {}
    for local, remote, state, inode in _table(pid):
        mine = f"socket:[{inode}]" in own
        if state == _LISTENS:
            listening.setdefault(local, set()).add(mine)
        elif mine and remote:
            links.add((local, remote))
    return links, {port for port, whose in listening.items() if whose == {True}}


def _table(pid: int) -> Iterator[tuple[int, int, str, str]]:
    """Every TCP socket where the process lives: its port, the other's, its state and inode."""
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{name}") as file:
                rows = file.readlines()[1:]
        except OSError:
            continue
        for row in rows:
            words = row.split()
            yield int(words[1].rpartition(":")[2], 16), int(words[2].rpartition(":")[2], 16), words[3], words[9]


class Cut:
    """A table of the packet filter; what is added to its sets is dropped for `duration_s` from now on."""

    def __init__(self, form: str, duration_s: float) -> None:
        """Raises RuntimeError with the reason."""
        self._name = f"shoal_cut_{os.getpid()}_{time.monotonic_ns()}"
        self._end_s = time.monotonic() + duration_s
        self._there: dict[str, set[str]] = {}
        self._tell(f"table inet {self._name} {{{form.format()}}}")

    def add(self, elements: dict[str, set[str]]) -> None:
        """By the set's name."""
        left_ms = max(1, int(1000 * (self._end_s - time.monotonic())))
        lines = []
        for name, wanted in elements.items():
            new = wanted - self._there.setdefault(name, set())
            self._there[name] |= new
            if new:
                each = ", ".join(f"{element} timeout {left_ms}ms" for element in sorted(new))
                lines.append(f"add element inet {self._name} {name} {{ {each} }}")
        if lines:
            self._tell("\n".join(lines))

    def end(self) -> None:
        self._tell(f"delete table inet {self._name}")

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def _tell(self, text: str) -> None:
        try:
            done = subprocess.run(
                ["nft", "-f", "-"],  # noqa: S607
                input=text,
                text=True,
                capture_output=True,
                check=False,
                env={"PATH": _NFT_PATH},
            )
        except FileNotFoundError:
            raise RuntimeError("nft is missing: install nftables") from None
        if done.returncode:
            reason = done.stderr.strip().partition("\n")[0]
            raise RuntimeError(f"nft: {reason} (it needs CAP_NET_ADMIN)")


def cut_node(cut: Cut, addresses: Sequence[str]) -> None:
    cut.add(
        {
            "hosts4": {address for address in addresses if ":" not in address},
            "hosts6": {address for address in addresses if ":" in address},
        }
    )
    time.sleep(max(0.0, cut.left_s))


def cut_process(cut: Cut, pid: int, start: str) -> None:
    while cut.left_s > 0 and start_time(pid) == start:
        links, ports = sockets(pid)
        cut.add({"links": {f"{own} . {other}" for own, other in links}, "ports": set(map(str, ports))})
        time.sleep(min(_LOOK_S, max(0.0, cut.left_s)))


def main() -> None:
    duration_s, what, *rest = sys.argv[1:]
    try:
        cut = Cut(_NODE if what == "node" else _PROCESS, FIRST_S + float(duration_s))
    except RuntimeError as error:
        sys.exit(str(error))
    go_on_alone()
    try:
        time.sleep(FIRST_S)
        if what == "node":
            cut_node(cut, rest)
        else:
            cut_process(cut, int(rest[0]), rest[1])
    finally:
        cut.end()


if __name__ == "__main__":
    main()
