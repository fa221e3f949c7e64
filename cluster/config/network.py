"""Where ranks speak to each other: the address they listen at, and what NCCL is told. Said once, for all nodes."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

__all__ = ["NetworkSettings", "address_of", "rank_address", "rank_variables"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSettings:
    """`interface` is a name that every node knows, or None for the one with the node's own address; `nccl` are NCCL's
    variables by their full names."""

    interface: str | None = None
    nccl: Mapping[str, str] = field(default_factory=dict)


def rank_address(network: NetworkSettings, node_address: str) -> str:
    """Where a rank on this node listens. Raises ValueError naming the key where the node lacks the interface."""
    return node_address if network.interface is None else address_of(network.interface)


def rank_variables(network: NetworkSettings) -> dict[str, str]:
    """What is to be in a rank's environment before torch is imported. gloo takes its interface from the address."""
    chosen = {"NCCL_SOCKET_IFNAME": network.interface} if network.interface is not None else {}
    return {**chosen, **network.nccl}


def address_of(interface: str) -> str:
    """The first address of an interface of this machine, IPv4 before IPv6. Raises ValueError."""
    found = psutil.net_if_addrs()
    addresses = found.get(interface, [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for address in addresses:
            if address.family == family and not address.address.startswith("fe80"):
                return address.address
    what = "has no address" if addresses else "does not exist"
    raise ValueError(
        f"cluster.network.interface: {interface} {what} on {socket.gethostname()}; it has {', '.join(sorted(found))}"
    )
