"""The cables between the hosts: a bridge, a cable to each, and how they are cut."""

from __future__ import annotations

import ipaddress
import json
import subprocess
from pathlib import Path

from tests.hosts.host import Host

__all__ = ["Network"]

_SUBNETS = ipaddress.ip_network("10.231.0.0/16")
# Nobody has it: a frame to it is delivered to nobody.
_NOBODY = "02:00:00:00:00:01"


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Network:
    """A subnet of its own on a bridge. The machine has the subnet's last address and reaches every host."""

    def __init__(self, bridge: str) -> None:
        self._bridge = bridge
        self.subnet = _free_subnet()
        self.addresses = [str(address) for address in self.subnet.hosts()]
        self.gateway = self.addresses[-1]
        self._lost_one_way: set[tuple[Host, str]] = set()
        self._cut: set[Host] = set()
        self._slow: set[Host] = set()
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{self.gateway}/{self.subnet.prefixlen}", "dev", bridge)
        _ip("link", "set", bridge, "up")

    def plug(self, host: Host, *, default_route: bool) -> None:
        """Gives a booted host its cable and address."""
        cable = self._cable(host)
        if Path(f"/sys/class/net/{cable}").exists():
            _ip("link", "delete", cable)  # of a killed host, which the kernel has not removed yet
        # The same after every boot: the others still know it.
        mac = "02:00:" + ":".join(f"{byte:02x}" for byte in ipaddress.ip_address(host.address).packed)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "address", mac, "netns", str(host.pid))
        _ip("link", "set", cable, "master", self._bridge, "up")
        host.net("ip", "link", "set", "lo", "up")
        host.net("ip", "address", "add", f"{host.address}/{self.subnet.prefixlen}", "dev", "eth0")
        host.net("ip", "link", "set", "eth0", "up")
        if default_route:
            host.net("ip", "route", "add", "default", "via", self.gateway)

    def cut(self, host: Host) -> None:
        """Pulls its cable: nothing comes or goes, and nobody is told."""
        _ip("link", "set", self._cable(host), "down")
        self._cut.add(host)

    def lose(self, sender: Host, receiver: str) -> None:
        """What `sender` sends to the address no longer arrives; the other direction does."""
        sender.net("ip", "neighbour", "replace", receiver, "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")
        self._lost_one_way.add((sender, receiver))

    def slow(self, host: Host, bits_per_s: int) -> None:
        """Both directions of its cable."""
        shape = ("root", "tbf", "rate", f"{bits_per_s}bit", "burst", "16kb", "latency", "400ms")
        host.net("tc", "qdisc", "replace", "dev", "eth0", *shape)
        subprocess.run(["tc", "qdisc", "replace", "dev", self._cable(host), *shape], check=True, capture_output=True)
        self._slow.add(host)

    def heal(self, host: Host | None = None) -> None:
        """Everything as it was, for hosts that run; or what concerns one of them."""
        for one in self._cut:
            if one.alive and host in (None, one):
                _ip("link", "set", self._cable(one), "up")
        for sender, receiver in self._lost_one_way:
            if sender.alive and (host is None or host is sender or host.address == receiver):
                sender.net("ip", "neighbour", "delete", receiver, "dev", "eth0")
        for one in self._slow:
            if one.alive and host in (None, one):
                one.net("tc", "qdisc", "delete", "dev", "eth0", "root")
                subprocess.run(["tc", "qdisc", "delete", "dev", self._cable(one), "root"], check=True)
        if host is not None:
            self._lost_one_way = {pair for pair in self._lost_one_way if pair[1] != host.address}
        self.forget(host)

    def forget(self, host: Host | None = None) -> None:
        """A host that boots again has a new cable."""
        self._cut = {other for other in self._cut if host not in (None, other)}
        self._slow = {other for other in self._slow if host not in (None, other)}
        self._lost_one_way = {pair for pair in self._lost_one_way if host not in (None, pair[0])}

    def _cable(self, host: Host) -> str:
        """The bridge's end; `shoal` and 15 characters' room."""
        return f"v{self._bridge.removeprefix('shoal')}-{host.name.rpartition('-')[2]}"


def _free_subnet() -> ipaddress.IPv4Network:
    used = [
        ipaddress.ip_address(address["local"])
        for interface in json.loads(_ip("-json", "-4", "address"))
        for address in interface["addr_info"]
    ]
    for subnet in _SUBNETS.subnets(new_prefix=24):
        if not any(address in subnet for address in used):
            return ipaddress.IPv4Network(subnet)
    raise RuntimeError(f"no free subnet in {_SUBNETS}")
