"""The ports of the doors, looked at before anything is started."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from cluster.config.load import ConfigError

__all__ = ["PortError", "free_port"]

_LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
_TRIES = 100


class PortError(Exception):
    """A port cannot be had; the message says which, and how to choose another."""


def free_port(host: str, port: int, *, key: str, option: str) -> int:
    """`port`, or a free one for 0. Raises PortError where somebody listens there, ConfigError for a bad host.

    Front doors of one node share a port by SO_REUSEPORT, so nobody would notice a stranger on it later.
    """
    if port == 0:
        return _any_port(host)
    problem = _problem(host, port)
    if problem is None:
        return port
    if problem == errno.EADDRINUSE:
        raise PortError(f"{key}: port {port} on {host} is in use; choose another with {option}")
    raise PortError(f"{key}: port {port} on {host} cannot be opened: {errno.errorcode.get(problem, problem)}")


def _any_port(host: str) -> int:
    """Below the range that the system gives away: Ray takes ports from there before the doors open theirs."""
    lowest_given = int(_LOCAL_RANGE.read_text().split()[0]) if _LOCAL_RANGE.exists() else 32_768
    candidates = range(_LOWEST, max(lowest_given, _LOWEST + _TRIES))
    for port in random.sample(candidates, _TRIES):
        if _problem(host, port) is None:
            return port
    raise PortError(f"no free port was found on {host}")


def _problem(host: str, port: int) -> int | None:
    """The errno of listening there."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"cluster.host: {host!r} is no address of this machine ({error.strerror})") from None
    family, kind, _, _, address = found[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1)
        except OSError as error:
            return error.errno
    return None
