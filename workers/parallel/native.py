"""Settings of native libraries that take them from the process's environment and from nowhere else.

gloo, NCCL and DeepSpeed's shared-memory op read these with C's getenv. They are set here for this process alone
with `os.putenv`, which leaves `os.environ` as it is: no module of ours can read them back, and none does.
"""

from __future__ import annotations

import ipaddress
import os

import psutil

__all__ = ["interface_of", "prepare_gloo", "prepare_nccl", "prepare_shared_memory"]


def prepare_gloo(host: str) -> None:
    """Makes gloo listen where `host` is; left alone it takes whatever the machine's own name resolves to."""
    if interface := interface_of(host):
        os.putenv("GLOO_SOCKET_IFNAME", interface)


def prepare_nccl() -> None:
    """2 aborts a communicator whose peer died; 3, the default, tears the whole process down."""
    os.putenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")


def prepare_shared_memory(world_size: int, name: str) -> None:
    """DeepSpeed's op crashes unless LOCAL_SIZE is the world's size, and names its buffers after the other two.

    `name` must differ between any two engines and starts on one host.
    """
    os.putenv("LOCAL_SIZE", str(world_size))
    os.putenv("MASTER_ADDR", "shoal")
    os.putenv("MASTER_PORT", name)


def interface_of(host: str) -> str | None:
    """The network interface that has the address `host`, or None where none has."""
    wanted = ipaddress.ip_address(host)
    for interface, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            try:
                found = ipaddress.ip_address(address.address.partition("%")[0])
            except ValueError:
                continue  # a hardware address
            if found == wanted:
                return interface
    return None
