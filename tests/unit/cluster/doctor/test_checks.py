"""Every check of the doctor: silent on healthy machines, and loud, with a fix, on its own fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest

from cluster.doctor import checks
from cluster.doctor.facts import Interface, Link, ModelThere, NodeFacts, Wanted
from cluster.doctor.finding import Finding, Level
from cluster.doctor.nodes import rounds
from cluster.front_door.tls import TlsFiles

GIB = 1 << 30
WANTED = Wanted(
    model_path="/models/m", ports=(9000, 8000), host="0.0.0.0", tls=TlsFiles(cert="/server.pem", key="/server.key")
)
LOOPBACK = Interface(name="lo", addresses=("127.0.0.1",), up=True, mbits_per_s=0)


def node(number: int, **changes: object) -> NodeFacts:
    """A healthy machine."""
    address = f"10.0.0.{number}"
    facts = NodeFacts(
        name=f"host-{number}",
        address=address,
        versions={"shoal": "1.0", "torch": "2.13"},
        interfaces=(LOOPBACK, Interface(name="eth0", addresses=(address,), up=True, mbits_per_s=10_000)),
        shared_memory_bytes=8 * GIB,
        shared_memory_free_bytes=8 * GIB,
        memory_bytes=64 * GIB,
        memory_free_bytes=60 * GIB,
        disk_free_bytes={"/tmp": 100 * GIB},
        compiler="/usr/bin/c++",
        sums_compiled=True,
        model=ModelThere(digest="abc", weight_bytes=10 * GIB),
        cores=16,
    )
    return replace(facts, **changes)  # type: ignore[arg-type]


def sick(nodes: Sequence[NodeFacts], wanted: Wanted = WANTED) -> list[Finding]:
    found = [finding for finding in checks.examine(nodes, wanted) if finding.level is not Level.OK]
    assert all(finding.fix for finding in found), "whatever is wrong has a fix"
    return found


def test_healthy_machines_pass_every_check() -> None:
    nodes = [node(1), node(2), node(3)]
    assert sick(nodes) == []
    found = checks.examine(nodes, WANTED)
    assert {finding.node for finding in found} == {"host-1", "host-2", "host-3"}
    assert len({finding.check for finding in found}) == len(checks.CHECKS)


@pytest.mark.parametrize(
    ("changes", "check", "text", "fix"),
    [
        ({"versions": {"shoal": "0.9", "torch": "2.13"}}, "versions", "shoal 0.9 (elsewhere 1.0)", "install the same"),
        ({"versions": {"shoal": "1.0"}}, "versions", "torch missing", "install the same"),
        ({"address": "127.0.0.1"}, "addresses", "which they cannot reach", "--node-ip-address=10.0.0.3"),
        ({"address": "10.9.9.9"}, "addresses", "no interface has 10.9.9.9", "--node-ip-address"),
        (
            {"interfaces": (Interface(name="eth0", addresses=("10.0.0.3",), up=False, mbits_per_s=0),)},
            "addresses",
            "eth0 is down",
            "ip link set eth0 up",
        ),
        ({"taken_ports": (9000,)}, "ports", "9000 taken", "--port"),
        (
            {"tls_problem": "/server.pem and /server.key: no such file"},
            "certificate",
            "no such file",
            "security.tls.cert",
        ),
        ({"clock_ahead_s": 4.0, "clock_error_s": 0.01}, "clock", "+4.000 s", "NTP"),
        ({"clock_ahead_s": -4.0, "clock_error_s": 0.01}, "clock", "-4.000 s", "NTP"),
        ({"shared_memory_free_bytes": 1 << 20}, "shared memory", "1.0 MiB of 8.0 GiB", "--shm-size"),
        ({"memory_free_bytes": 1 << 29}, "memory", "512.0 MiB of 64.0 GiB", "end what else"),
        ({"disk_free_bytes": {"/tmp": 1 << 20}}, "disk", "1.0 MiB free in /tmp", "make room"),
        ({"model": ModelThere(problem="/models/m is not there")}, "model", "is not there", "copy the model"),
        ({"model": ModelThere(digest="xyz")}, "model", "not the model of the other nodes", "--checksum"),
        ({"token_auth": False}, "Ray's token", "without a token", "get-auth-token"),
    ],
)
def test_one_sick_machine_is_found_and_named(changes: dict[str, object], check: str, text: str, fix: str) -> None:
    (found,) = sick([node(1), node(2), node(3, **changes)])
    assert (found.check, found.node, found.level) == (check, "host-3", Level.FAILURE)
    assert text in found.text
    assert fix in found.fix


def test_a_name_server_that_does_not_answer_is_worth_a_warning() -> None:
    (found,) = sick([node(1), node(2, lookup_s=2.0)])
    assert (found.check, found.node, found.level) == ("names", "host-2", Level.WARNING)
    assert "2.0 s" in found.text
    assert "::ffff:10.0.0.2 host-2" in found.fix


def test_a_named_interface_must_be_everywhere() -> None:
    wanted = replace(WANTED, interface="ib0")
    both = (Interface(name="ib0", addresses=("10.1.0.1",), up=True, mbits_per_s=0), *node(1).interfaces)
    (found,) = sick([node(1, interfaces=both), node(2)], wanted)
    assert found.node == "host-2"
    assert "cluster.network.interface ib0 does not exist" in found.text
    assert "lo, eth0" in found.fix


def test_ports_that_our_own_front_door_holds_are_well() -> None:
    assert sick([node(1, taken_ports=(9000, 8000), serving=True)]) == []


def test_a_clock_that_cannot_be_told_is_not_blamed() -> None:
    assert sick([node(1), node(2, clock_ahead_s=1.5, clock_error_s=0.9)]) == []


def test_weights_that_no_cluster_can_hold() -> None:
    huge = ModelThere(digest="abc", weight_bytes=200 * GIB)
    (found,) = sick([node(1, model=huge), node(2, model=huge)])
    assert "200.0 GiB" in found.text
    assert "120.0 GiB" in found.text


def test_without_a_compiler_only_tensor_parallel_plans_lose() -> None:
    bare = [node(1, compiler="", sums_compiled=False)]
    assert sick(bare) == []
    (found,) = sick(bare, replace(WANTED, tensor=2))
    assert found.level is Level.WARNING
    assert "apt-get install g++" in found.fix
    (found,) = sick([node(1, sums_compiled=False)], replace(WANTED, tensor=2))
    assert found.fix == "python -m workers.parallel.build"


def test_a_single_machine_on_loopback_needs_neither_token_nor_address() -> None:
    assert sick([node(1, address="127.0.0.1", token_auth=False)]) == []


def test_what_was_not_asked_for_is_not_judged() -> None:
    found = checks.examine([node(1, model=None)], Wanted())
    assert {"ports", "model"}.isdisjoint(finding.check for finding in found)


def test_links() -> None:
    good = Link(first="a", second="b", latency_s=0.0003, bytes_per_s=1e9)
    slow = Link(first="a", second="c", latency_s=0.0003, bytes_per_s=1e6)
    far = Link(first="b", second="c", latency_s=0.05, bytes_per_s=1e9)
    cut = Link(first="b", second="d", problem="no handshake in 15 s")
    found = list(checks.links([good, slow, far, cut]))
    assert [finding.level for finding in found] == [Level.OK, Level.WARNING, Level.WARNING, Level.FAILURE]
    assert found[0].text == "gloo all-reduce 0.30 ms, 1000 MB/s"
    assert "firewall" in found[3].fix


@pytest.mark.parametrize(
    ("nodes", "bundle", "count", "level"),
    [
        ({"a": 2.0, "b": 2.0}, 1, 4, Level.OK),
        ({"a": 2.0, "b": 2.0}, 1, 5, Level.FAILURE),
        ({"a": 3.0, "b": 1.0}, 2, 2, Level.FAILURE),
        ({}, 1, 1, Level.FAILURE),
    ],
)
def test_room(nodes: dict[str, float], bundle: float, count: int, level: Level) -> None:
    assert checks.room(nodes, "CPU", bundle, count).level is level


@pytest.mark.parametrize("count", range(8))
def test_every_pair_meets_once_and_nobody_is_in_two_places(count: int) -> None:
    met = []
    for pairs in rounds(count):
        busy = [place for pair in pairs for place in pair]
        assert len(busy) == len(set(busy))
        met += pairs
    assert sorted(met) == sorted(combinations(range(count), 2))
