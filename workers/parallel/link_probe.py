"""Measures what lies between two machines, as ranks would use it: `python -m workers.parallel.link_probe JSON`.

One process on each machine, because a handshake that fails blocks and cannot be called off: whoever starts them ends
them. The first one listens at its own address and prints `{"port": ...}`; both print what they measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it comes from C++

from workers.parallel import native
from workers.parallel.groups import host_store

__all__ = ["LinkFigures", "ProbeOrder", "main"]

_ROUNDS = 20
_SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)  # values of 4 bytes
_LONG_ENOUGH_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeOrder:
    """What one end is told; `port` is the first end's, 0 at that end itself."""

    first: bool
    host: str  # this end's address
    first_host: str
    port: int
    device: str
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFigures:
    """Of an all-reduce of one value, and of as many as took long enough to tell: bytes that went each way."""

    kind: str
    latency_s: float
    bytes_per_s: float


def measure(order: ProbeOrder) -> LinkFigures:
    """Raises RuntimeError, OSError or TimeoutError where the two do not meet."""
    timeout = timedelta(seconds=order.timeout_s)
    native.prepare_gloo(order.host)
    native.prepare_nccl()
    if order.first:
        hosted = host_store(order.first_host)
        sys.stdout.write(json.dumps({"port": hosted.port}) + "\n")
        sys.stdout.flush()
        port = hosted.port
    else:
        port = order.port
    store = TCPStore(order.first_host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    kind = "nccl" if order.device == "cuda" else "gloo"
    distributed.init_process_group(kind, store=store, rank=0 if order.first else 1, world_size=2, timeout=timeout)
    device = torch.device(order.device)
    one = torch.zeros(1, device=device)
    _reduce(one)  # connects
    latency_s = statistics.median(_reduce(one) for _ in range(_ROUNDS))
    bytes_per_s = 0.0
    for count in _SIZES:
        took_s = torch.tensor(_reduce(torch.zeros(count, device=device)), device=device)
        # Both ends must come to the same decision.
        distributed.all_reduce(took_s, op=distributed.ReduceOp.MAX)
        bytes_per_s = count * 4 / float(took_s)
        if float(took_s) > _LONG_ENOUGH_S:
            break
    return LinkFigures(kind=kind, latency_s=latency_s, bytes_per_s=bytes_per_s)


def _reduce(x: torch.Tensor) -> float:
    began_s = time.perf_counter()
    distributed.all_reduce(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def main() -> None:
    """Exits with 1 and one line on standard error where there is nothing to measure."""
    order = ProbeOrder(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    try:
        figures = measure(order)
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"{str(error).splitlines()[0] if str(error) else type(error).__name__}\n")
        sys.exit(1)
    sys.stdout.write(json.dumps(asdict(figures)) + "\n")
    sys.stdout.flush()
    # The first end holds the store: it stays until the second one has read its last answer there.
    distributed.barrier()


if __name__ == "__main__":
    main()
