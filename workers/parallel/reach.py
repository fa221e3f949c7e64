"""Which ranks this one cannot reach, though their processes live: a cut network."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from workers.report import RankAddress

__all__ = ["out_of_reach"]


def out_of_reach(addresses: Sequence[RankAddress], timeout_s: float) -> list[int]:
    """Those of the ranks that listen to which no connection can be made in time; all are tried at once.

    The kernel accepts for a process, whatever it does: one that works or is frozen is within reach. What is connected
    here and closed at once counts as a stranger there.
    """
    listening = [address for address in addresses if address.plan_port]
    if not listening:
        return []
    with ThreadPoolExecutor(len(listening)) as pool:
        reached = pool.map(lambda address: _connects(address, timeout_s), listening)
        return [address.rank for address, found in zip(listening, reached, strict=True) if not found]


def _connects(address: RankAddress, timeout_s: float) -> bool:
    try:
        socket.create_connection((address.host, address.plan_port), timeout=timeout_s).close()
    except OSError:
        return False
    return True
