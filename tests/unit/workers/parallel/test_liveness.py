"""Connections to hosts that may be lost: which are watched by the kernel, and that looking for them costs nothing."""

from __future__ import annotations

import os
import socket

from workers.parallel.liveness import quicken_all


def test_every_connection_to_a_host_is_found_and_nothing_else() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as ours,
        listener.accept()[0] as theirs,
    ):
        assert quicken_all(["127.0.0.1"], 3.0) == 2
        for connection in (ours, theirs):
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000
        assert quicken_all(["192.0.2.1"], 1.0) == 0
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000


def test_looking_leaves_no_descriptor_open() -> None:
    """Every generation looks."""
    ends = [end for _ in range(5) for end in os.pipe()]
    local = socket.socketpair()
    with open(os.devnull) as file:
        before = os.listdir("/proc/self/fd")
        quicken_all(["192.0.2.1"], 1.0)
        assert len(os.listdir("/proc/self/fd")) == len(before), file
    for end in ends:
        os.close(end)
    for one in local:
        one.close()
