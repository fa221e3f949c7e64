"""How long a silence means what.

A rank that computes for long is not one that hangs. First ranks therefore tell each other several times within the
step timeout that their processes run (`pulse.py`), whatever their steps do, and only that silence counts. A process
that runs and yet never ends its step is given up after the much longer time that is here.

A host that is lost says nothing at all, not even that its connections are closed: the kernel finds out for every
connection that `quicken` was told of.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable

__all__ = ["quicken", "quicken_all", "stuck_after_s"]

_LEAST_STUCK_S = 30.0
_STUCK_PER_TIMEOUT = 10.0
_PROBES = 3


def stuck_after_s(step_timeout_s: float) -> float:
    """When a step counts as stuck although every process runs."""
    return max(_LEAST_STUCK_S, _STUCK_PER_TIMEOUT * step_timeout_s)


def quicken(connection: socket.socket, timeout_s: float) -> None:
    """Has the kernel end a TCP connection whose other host answers nothing for about `timeout_s`."""
    every_s = max(1, round(timeout_s / _PROBES))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES - 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(timeout_s * 1000))


def quicken_all(hosts: Iterable[str], timeout_s: float) -> int:
    """The same for every connection of this process to one of `hosts`, which libraries made; how many there are.

    gloo's sockets cannot be had from gloo. That other connections to those hosts are ended as soon does no harm.
    """
    wanted = set(hosts)
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.getpeername()[0] not in wanted:
                    continue
                quicken(connection, timeout_s)
                count += 1
        except (OSError, IndexError):
            continue  # not connected, not TCP, or closed in between
    return count
