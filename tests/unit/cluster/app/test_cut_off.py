"""What a process is cut off from: its connections, and the ports that are its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from cluster.app.cut_off import sockets


def _listener(port: int = 0) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return listener


def test_connections_and_ports_of_a_process() -> None:
    with _listener() as listener, socket.create_connection(listener.getsockname()) as connection:
        accepted, _ = listener.accept()
        port, other = listener.getsockname()[1], connection.getsockname()[1]
        with accepted:
            links, ports = sockets(os.getpid())
        assert {(port, other), (other, port)} <= links
        assert port in ports
        assert other not in ports


def test_a_port_that_another_process_shares_is_not_its_own() -> None:
    with _listener() as listener:
        port = listener.getsockname()[1]
        source = "import socket\ns = socket.socket()\ns.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        source += f"s.bind(('127.0.0.1', {port}))\ns.listen()\nprint(flush=True)\ninput()"
        with subprocess.Popen(
            [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            assert port not in sockets(os.getpid())[1]
            assert port not in sockets(other.pid)[1]
            other.communicate("\n")
        assert port in sockets(os.getpid())[1]


def test_a_process_that_has_gone_has_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
        assert sockets(gone.pid) == (set(), set())
