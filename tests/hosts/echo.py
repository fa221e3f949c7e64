"""A program for hosts: answers every datagram with itself and prints it. `python -m tests.hosts.echo ADDRESS PORT`.

With a third argument it sends numbers there, one every 20 ms, and prints what comes back.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import sys


def main() -> None:
    address, port, *peer = sys.argv[1:]
    with socket.socket(type=socket.SOCK_DGRAM) as ours:
        ours.bind((address, int(port)))
        ours.settimeout(0.02 if peer else None)
        for number in itertools.count():
            if peer:
                with contextlib.suppress(OSError):  # a pulled cable
                    ours.sendto(str(number).encode(), (peer[0], int(port)))
            with contextlib.suppress(OSError):
                data, sender = ours.recvfrom(64)
                print(data.decode(), flush=True)
                if not peer:
                    ours.sendto(data, sender)


if __name__ == "__main__":
    main()
