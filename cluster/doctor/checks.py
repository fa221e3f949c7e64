"""One function a check: from what the machines told to findings, at least one each. Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from cluster.config.sizes import show_size
from cluster.doctor.facts import Link, NodeFacts, Wanted
from cluster.doctor.finding import Finding, failure, passed, warning

__all__ = ["CHECKS", "PREFLIGHT", "Check", "examine", "links", "room"]

Check = Callable[[Sequence[NodeFacts], Wanted], Iterator[Finding]]

_GIB = 1 << 30
_MAX_CLOCK_AHEAD_S = 1.0
_MIN_SHARED_MEMORY_BYTES = 256 << 20
_MIN_FREE_BYTES = 1 * _GIB
_MIN_DISK_BYTES = 2 * _GIB
_SLOW_S = 0.002
_MAX_LOOKUP_S = 0.5
_SLOW_BYTES_PER_S = 100e6  # a gigabit Ethernet carries a little more


def versions(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    """What most nodes have is taken for right; the first one's, where there is no majority."""
    del wanted
    names = list(dict.fromkeys(name for node in nodes for name in node.versions))
    usual = {name: Counter(node.versions.get(name, "missing") for node in nodes).most_common(1)[0][0] for name in names}
    for node in nodes:
        other = [
            f"{name} {node.versions.get(name, 'missing')} (elsewhere {usual[name]})"
            for name in names
            if node.versions.get(name, "missing") != usual[name]
        ]
        absent = [name for name in names if node.versions.get(name) == usual[name] == "missing"]
        if other or absent:
            text = ", ".join([*other, *(f"{name} is not installed" for name in absent)])
            fix = "install the same shoal with the same constraints.txt there, then start Ray there again"
            yield failure("versions", node.name, text, fix)
        else:
            yield passed("versions", node.name, ", ".join(f"{name} {usual[name]}" for name in names))


def addresses(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    """Whether ranks find an address that the other nodes reach."""
    for node in nodes:
        by_name = {interface.name: interface for interface in node.interfaces}
        if wanted.interface is not None:
            known = ", ".join(by_name) or "none"
            chosen = by_name.get(wanted.interface)
            if chosen is None or not chosen.addresses:
                what = "does not exist" if chosen is None else "has no address"
                fix = f"name one of {known}, or leave the key out to use the node's own address"
                yield failure("addresses", node.name, f"cluster.network.interface {wanted.interface} {what}", fix)
                continue
        else:
            chosen = next((i for i in node.interfaces if node.address in i.addresses), None)
        if len(nodes) > 1 and ipaddress.ip_address(node.address).is_loopback:
            fix = (
                f"start Ray there with --node-ip-address={_outside(node) or 'ADDRESS'} (a host without a default route)"
            )
            yield failure(
                "addresses", node.name, f"known to the others as {node.address}, which they cannot reach", fix
            )
        elif chosen is None:
            fix = "start Ray there again with --node-ip-address and an address of that host"
            yield failure("addresses", node.name, f"no interface has {node.address}", fix)
        elif not chosen.up:
            yield failure("addresses", node.name, f"{chosen.name} is down", f"ip link set {chosen.name} up")
        else:
            speed = f", {chosen.mbits_per_s} Mbit/s" if chosen.mbits_per_s > 0 else ""
            yield passed("addresses", node.name, f"{node.address}, ranks on {chosen.name}{speed}")


def _outside(node: NodeFacts) -> str | None:
    found = (a for i in node.interfaces if i.up for a in i.addresses if "%" not in a)
    return next((a for a in found if not ipaddress.ip_address(a).is_loopback), None)


def ports(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    for node in nodes if wanted.ports else ():
        taken = ", ".join(map(str, node.taken_ports))
        if node.serving:
            yield passed("ports", node.name, f"{taken}: a front door answers")
        elif taken:
            fix = "end what listens there (`ss -ltnp` names it), or serve with --port and --http-port"
            yield failure("ports", node.name, f"{taken} taken by another program", fix)
        else:
            yield passed("ports", node.name, f"{', '.join(map(str, wanted.ports))} free")


def certificate(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    """Front doors may be placed on any node."""
    for node in nodes if wanted.tls is not None else ():
        if node.tls_problem:
            fix = "put the certificate and its key there, or name others in security.tls.cert and security.tls.key"
            yield failure("certificate", node.name, node.tls_problem, fix)
        else:
            yield passed("certificate", node.name, "there, and its key fits")


def names(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    """A name server that does not answer holds up whoever connects."""
    del wanted
    for node in nodes:
        text = f"looked up in {node.lookup_s:.1f} s"
        if node.lookup_s > _MAX_LOOKUP_S:
            line = f"::ffff:{node.address} {node.name}"
            fix = f"name a server that answers in /etc/resolv.conf, or all nodes in /etc/hosts, such as `{line}`"
            yield warning("names", node.name, f"{text}: every start and every regroup waits as long", fix)
        else:
            yield passed("names", node.name, text)


def clocks(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    """Against the asking machine; what the measurement cannot tell apart is not held against anybody."""
    del wanted
    for node in nodes:
        text = f"{node.clock_ahead_s:+.3f} s (known to {node.clock_error_s:.3f} s)"
        if abs(node.clock_ahead_s) - node.clock_error_s > _MAX_CLOCK_AHEAD_S:
            fix = "keep its time by NTP: chronyd or systemd-timesyncd"
            yield failure("clock", node.name, f"{text}: traces, logs and certificates need one time", fix)
        else:
            yield passed("clock", node.name, text)


def shared_memory(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    del wanted
    for node in nodes:
        text = f"{show_size(node.shared_memory_free_bytes)} of {show_size(node.shared_memory_bytes)} free"
        if node.shared_memory_free_bytes < _MIN_SHARED_MEMORY_BYTES:
            fix = "mount -o remount,size=2G /dev/shm; in a container --shm-size=2g; delete what was left there"
            yield failure("shared memory", node.name, f"{text}, Ray's object store lies in it", fix)
        else:
            yield passed("shared memory", node.name, text)


def memory(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    for node in nodes:
        text = f"{show_size(node.memory_free_bytes)} of {show_size(node.memory_bytes)} free"
        if node.memory_free_bytes < _MIN_FREE_BYTES:
            yield failure("memory", node.name, text, "end what else runs there, or take the node out of the cluster")
        else:
            yield passed("memory", node.name, text)
    weights = max((node.model.weight_bytes for node in nodes if node.model), default=0)
    free = sum(node.memory_free_bytes for node in nodes)
    if wanted.device == "cpu" and weights > free:
        fix = "a smaller model, inference.quantization: int8, or more nodes"
        text = f"the weights are {show_size(weights)}, all nodes together have {show_size(free)} free"
        yield failure("memory", "", text, fix)


def disk(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    del wanted
    for node in nodes:
        for folder, free in node.disk_free_bytes.items():
            text = f"{show_size(free)} free in {folder}"
            if free < _MIN_DISK_BYTES:
                fix = f"make room in {folder}, where Ray keeps logs and sockets (ray start --temp-dir moves them)"
                yield failure("disk", node.name, text, fix)
            else:
                yield passed("disk", node.name, text)


def compiler(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    """Its one use on CPUs is the shared-memory sum of tensor-parallel ranks."""
    build = "python -m workers.parallel.build"
    for node in nodes:
        if node.sums_compiled:
            yield passed("compiler", node.name, "the shared-memory collective is compiled")
        elif wanted.device != "cpu" or wanted.tensor == 1:
            yield passed("compiler", node.name, f"{node.compiler or 'none'}; nothing of this plan needs one")
        elif node.compiler:
            text = "the shared-memory collective is not compiled: tensor-parallel ranks use gloo, which is slower"
            yield warning("compiler", node.name, text, build)
        else:
            text = "no C++ compiler: tensor-parallel ranks use gloo, which is slower"
            yield warning("compiler", node.name, text, f"apt-get install g++, then {build}")


def model(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    """There, whole, and the same on every node."""
    there = [node.model for node in nodes if node.model is not None]
    digests = Counter(found.digest for found in there if not found.problem)
    usual = digests.most_common(1)[0][0] if digests else ""
    for node in nodes:
        if node.model is None:
            continue
        if node.model.problem:
            fix = f"copy the model to {wanted.model_path} there (rsync), or put it on a folder that all nodes mount"
            yield failure("model", node.name, node.model.problem, fix)
        elif node.model.digest != usual:
            text = f"{wanted.model_path} is not the model of the other nodes ({node.model.digest}, elsewhere {usual})"
            yield failure("model", node.name, text, "copy it there again (rsync --checksum)")
        else:
            yield passed("model", node.name, f"{wanted.model_path}, {show_size(node.model.weight_bytes)}")


def authentication(nodes: Sequence[NodeFacts], wanted: Wanted) -> Iterator[Finding]:
    """A Ray port without a token runs anybody's code."""
    del wanted
    if len(nodes) == 1 and ipaddress.ip_address(nodes[0].address).is_loopback:
        return
    for node in nodes:
        if node.token_auth:
            yield passed("Ray's token", node.name, "demanded")
        else:
            text = "Ray runs without a token: whoever reaches its port runs what he likes"
            fix = "`ray get-auth-token --generate`, the file on every node, RAY_AUTH_MODE=token, start Ray again"
            yield failure("Ray's token", node.name, text, fix)


def room(nodes: Mapping[str, float], resource: str, bundle: float, count: int) -> Finding:
    """Whether `count` bundles fit at all; `nodes` is what each has of the resource, used or not."""
    has = ", ".join(f"{name} {amount:g}" for name, amount in nodes.items()) or "nobody any"
    text = f"ranks need {count} times {bundle:g} {resource} in one piece; the cluster has: {has}"
    if sum(int(amount // bundle) for amount in nodes.values()) < count:
        fix = "more nodes, fewer ranks (parallel, cluster.engines), or fewer threads each (resources.cpu_threads)"
        return failure("room", "", text, fix)
    return passed("room", "", text)


def links(found: Sequence[Link]) -> Iterator[Finding]:
    """Every two nodes' handshake."""
    for link in found:
        between = f"{link.first} - {link.second}"
        if link.problem:
            fix = (
                f"let {link.first} and {link.second} reach each other on all TCP ports (cable, switch, firewall), "
                "or name another interface in cluster.network.interface"
            )
            yield failure("link", between, link.problem, fix)
            continue
        text = f"{link.kind} all-reduce {link.latency_s * 1e3:.2f} ms, {link.bytes_per_s / 1e6:.0f} MB/s"
        if link.latency_s > _SLOW_S or link.bytes_per_s < _SLOW_BYTES_PER_S:
            fix = "keep the engine's ranks on nodes that are near each other, or use a faster interface"
            yield warning("link", between, f"{text}: slow for ranks of one engine", fix)
        else:
            yield passed("link", between, text)


CHECKS: tuple[Check, ...] = (
    versions,
    addresses,
    ports,
    certificate,
    names,
    clocks,
    shared_memory,
    memory,
    disk,
    compiler,
    model,
    authentication,
)
PREFLIGHT: tuple[Check, ...] = (versions, addresses, model)
"""What a start on a cluster cannot do without, and what takes no time to see."""


def examine(nodes: Sequence[NodeFacts], wanted: Wanted, checks: Sequence[Check] = CHECKS) -> tuple[Finding, ...]:
    """All findings, check by check."""
    return tuple(finding for check in checks for finding in check(nodes, wanted))
