"""The ports of the doors, looked at before anything is started."""

from __future__ import annotations

import errno
import socket

from cluster.config.load import ConfigError

__all__ = ["PortError", "free_port"]


class PortError(Exception):
    """A port cannot be had; the message says which, and how to choose another."""


def free_port(host: str, port: int, *, key: str, option: str) -> int:
    """`port`, or a free one for 0. Raises PortError where somebody listens there, ConfigError for a bad host.

    Front doors of one node share a port by SO_REUSEPORT, so nobody would notice a stranger on it later.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except socket.gaierror as error:
        raise ConfigError(f"cluster.host: {host!r} is no address of this machine ({error.strerror})") from None
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortError(f"{key}: port {port} on {host} is in use; choose another with {option}") from None
            raise PortError(f"{key}: port {port} on {host} cannot be opened: {error.strerror}") from None
        return int(listener.getsockname()[1])
