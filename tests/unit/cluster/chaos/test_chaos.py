"""Faults from a seed, and what the records of streams say about them."""

from __future__ import annotations

import random

import pytest

from cluster.chaos.campaign import spared, whole, works
from cluster.chaos.doors import ChaosError, Doors
from cluster.chaos.injector import AdminInjector, Harm, Injectors
from cluster.chaos.load import StreamRecord, Wait, Work
from cluster.chaos.report import as_html, as_json, as_lines
from cluster.chaos.schedule import Fault, Plan, crossed, draw, parse_weights
from cluster.chaos.targets import processes_of
from cluster.chaos.verdict import Hit, percentile, verdict
from cluster.roster import EngineReport, FrontDoorReport
from protos.shoal.v1 import admin_pb2
from protos.shoal.v1.admin_pb2 import StatusResponse as Status

THERE = {"rank": ["e/rank-0", "e/rank-1", "e/rank-2"], "leader": ["e/leader"], "front-door": []}
WORK = Work("a", 1, 4)


def test_faults_follow_from_the_seed() -> None:
    roles = {"rank": 2.0, "leader": 1.0, "front-door": 1.0}
    plan = Plan(weights=crossed(roles, {"kill": 1.0, "freeze": 1.0, "slow": 1.0}), double=0.5)

    def faults(seed: int) -> list[Fault]:
        rng = random.Random(seed)
        return [draw(plan, rng, THERE) for _ in range(60)]

    assert faults(1) == faults(1) != faults(2)
    assert {fault.role for fault in faults(1)} == {"rank", "leader"}, "nobody hits what is not there"
    assert {fault.kind for fault in faults(1)} == {"kill", "freeze", "slow"}
    doubles = [fault for fault in faults(1) if len(fault.targets) == 2]
    assert doubles
    assert all(fault.role == "rank" and len(set(fault.targets)) == 2 for fault in doubles)
    assert all((fault.duration_s > 0) == (fault.kind != "kill") for fault in faults(1))


def test_nobody_to_hit_is_an_error() -> None:
    with pytest.raises(ValueError, match="front-door"):
        draw(Plan(weights={("kill", "front-door"): 1.0}), random.Random(0), THERE)


def test_a_kind_lasts_as_long_as_is_said_of_it() -> None:
    plan = Plan(weights={("kill", "host"): 1.0}, lasting_s={"kill host": 4.0, "kill": 1.0}, double=1.0)
    fault = draw(plan, random.Random(0), {"host": ["a", "b", "c"]})
    assert (fault.duration_s, len(fault.targets)) == (4.0, 1), "hosts fall one at a time"


def test_weights_are_read() -> None:
    assert parse_weights("rank=3, leader", ("rank", "leader", "roster"), "--roles") == {"rank": 3.0, "leader": 1.0}
    for text, says in (
        ("rnk", "none of rank"),
        ("rank=x", "no weight"),
        ("rank=-1", "at least 0"),
        ("rank=0", "above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_weights(text, ("rank",), "--roles")


def _record(start_s: float, *waits: Wait, **more: object) -> StreamRecord:
    record = StreamRecord(WORK, start_s, ended_s=start_s + 4, token_ids=[1, 2, 3, 4], **more)  # type: ignore[arg-type]
    record.arrivals = [(start_s + at, 1) for at in range(4)]
    record.waits = list(waits)
    return record


def test_the_verdict_counts_what_clients_saw() -> None:
    kill = Hit(Fault("kill", "rank", ("e/rank-0",)), 10.0, 12.0)
    freeze = Hit(Fault("freeze", "leader", ("e/leader",), 5.0), 20.0, 25.0)
    records = [
        _record(0.0, Wait(0.0, 0.3)),
        _record(9.0, Wait(9.9, 1.5)),
        _record(19.0),
        _record(21.0, error="UNAVAILABLE: no"),
        _record(22.0, broken="repeated"),
        _record(23.0, broken="skipped"),
    ]
    records[0].token_ids = [9, 9, 9, 9]
    limits_s = {"kill rank": 1.0, "freeze leader": 1.0}
    found = verdict(
        records, [kill, freeze], seed=3, began_s=0.0, ended_s=30.0, expected={WORK: [1, 2, 3, 4]}, limits_s=limits_s
    )
    assert (found.num_started, found.num_finished, found.num_lost) == (6, 3, 1)
    assert (found.num_repeated, found.num_skipped, found.num_differing) == (1, 1, 1)
    assert not found.clean
    assert (found.pauses.count, found.pauses.max_s) == (2, 1.5)
    assert found.pauses_by_fault["freeze leader"].max_s == 0.0, "a stream that did not wait counts, too"
    assert found.undisturbed.max_s == 0.3
    assert found.heal_by_fault["kill rank"].max_s == 2.0
    assert found.tokens_per_s["before"] == pytest.approx(5 / 10)
    assert set(found.tokens_per_s) == {"before", "during", "after"}
    lines = list(as_lines(found))
    assert any(line.startswith("pauses after kill rank") and line.endswith("p99 <= 1 s: MISSED") for line in lines)
    assert any(line.startswith("pauses after freeze leader") and line.endswith("p99 <= 1 s: reached") for line in lines)
    assert "MISSED" in as_html(found)


def test_a_pause_belongs_to_the_fault_that_began_it() -> None:
    hits = [Hit(Fault("kill", role, (role,)), at_s, at_s + 2) for role, at_s in (("rank", 10.0), ("roster", 13.0))]
    hits[1].overlaps = True
    records = [
        _record(8.0, Wait(8.5, 4.9)),  # begins before the rank's death, ends behind the roster's
        _record(9.0, Wait(12.5, 1.0)),
        _record(11.0, Wait(14.0, 2.0)),
        _record(9.5, Wait(10.5, 1.0), Wait(13.1, 0.5)),  # both cost it something
    ]
    found = verdict(records, hits, seed=0, began_s=0.0, ended_s=20.0, expected=None)
    assert found.pauses_by_fault["kill rank"].count == 3
    assert found.pauses_by_fault["kill rank"].max_s == 4.9
    assert found.pauses_by_fault["kill roster (while others return)"].count == 3
    assert [hit["longest_pause_s"] for hit in found.hits] == [4.9, 2.0]


def test_a_clean_campaign_is_told_as_one() -> None:
    found = verdict([_record(0.0)], [], seed=0, began_s=0.0, ended_s=5.0, expected=None)
    assert found.clean
    assert "nothing lost" in as_html(found)
    assert '"clean": true' in as_json(found)
    assert "lost: 0" in list(as_lines(found))


def test_the_page_escapes_what_servers_say() -> None:
    found = verdict([_record(0.0, error="<script>")], [], seed=0, began_s=0.0, ended_s=5.0, expected=None)
    assert "<script>" not in as_html(found)


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.99) == 2.0


def test_works_are_repeatable_and_differ() -> None:
    assert works(16, 100, 1) == works(16, 100, 1)
    assert len(set(works(16, 100, 1))) == 16
    assert all(50 <= work.num_tokens <= 100 for work in works(16, 100, 1))


def _status(*, state: str = "ready", pid: int = 7, num_ranks: int = 2, links: int | None = None) -> Status:
    engine = admin_pb2.EngineStatus(name="e", state=state, leader_pid=5, leader_node="a")
    for rank in range(num_ranks):
        engine.ranks.add(rank=rank, node="a", pid=pid + rank)
        engine.dp_groups.add(index=rank)
    status = Status(engines=[engine])
    status.front_doors.add(id="d", node="b", pid=6, dp_groups=["e/0"] * (num_ranks if links is None else links))
    return status


def test_a_cluster_is_whole_when_all_is_there_and_ready() -> None:
    before = _status()
    assert whole(_status(pid=9), before, frozenset({("a", 7)}))
    assert whole(_status(), before, frozenset({("b", 7)})), "pids are of their hosts"
    assert not whole(_status(), before, frozenset({("a", 7)})), "the dead rank is still counted"
    assert not whole(_status(state="loading"), before, frozenset())
    assert not whole(_status(num_ranks=1), before, frozenset()), "a group is missing"
    assert not whole(_status(links=0), before, frozenset()), "a front door has no stream to it yet"
    assert not whole(Status(), before, frozenset())


def test_what_is_hit_while_others_are_down_leaves_somebody() -> None:
    targets = AdminInjector(Doors(["a:1"], "")).targets(_status(num_ranks=4))
    assert targets["front-door"] == ["front-door/d"]
    found = spared({**targets, "host": ["a"]}, _status(num_ranks=4), frozenset({("a", 7)}))
    assert len(found["rank"]) == 2
    assert (found.get("host"), found.get("engine"), found["front-door"]) == (None, None, ())
    assert found["leader"] == ["e/leader"]
    assert spared(targets, _status(num_ranks=4), frozenset({("a", 7), ("a", 8)}))["rank"] == []


def test_nodes_are_hit_that_leave_somebody_of_everything() -> None:
    """Here the leader and group 0 are on `a`, groups 1 and 2 on `b` and `c`, and front doors on `b` and `d`."""
    engine = admin_pb2.EngineStatus(name="e", state="ready", leader_pid=5, leader_node="a")
    for group, node in enumerate("abc"):
        engine.ranks.add(rank=2 * group, dp_group=group, node=node, pid=7)
        engine.ranks.add(rank=2 * group + 1, dp_group=group, node="c" if group == 1 else node, pid=8)
    status = Status(engines=[engine])
    injector = AdminInjector(Doors(["a:1"], ""))
    for node in "bd":
        status.front_doors.add(id=node, node=node, pid=6)
    assert injector.targets(status)["node"] == ["node/b", "node/c", "node/d"]
    del status.front_doors[0]
    assert injector.targets(status)["node"] == ["node/b", "node/c"], "there is one front door"
    del engine.ranks[:2]
    status.engines[0].CopyFrom(engine)
    assert injector.targets(status)["node"] == ["node/b"], "group 1 is on both, group 2 on `c` alone"
    fault = draw(Plan(weights={("partition", "node"): 1.0}, double=1.0), random.Random(0), {"node": list("abcd")})
    assert (len(fault.targets), fault.duration_s) == (1, 6.0), "one at a time"


def test_a_node_stands_for_what_shoal_has_there() -> None:
    engine = EngineReport(engine="e", leader="l", status=admin_pb2.EngineStatus(name="e"), node="a", pid=5)
    engine.status.ranks.add(rank=0, node="a", pid=7)
    engine.status.ranks.add(rank=1, node="b", pid=8)
    door = FrontDoorReport(id="d", node="b", pid=6)
    assert processes_of("node/a", [engine], [door]) == [("a", 7), ("a", 5)]
    assert processes_of("node/b", [engine], [door]) == [("b", 8), ("b", 6)]
    assert not processes_of("node/c", [engine], [door])


async def test_every_role_has_its_injector() -> None:
    class Hosts:
        def targets(self, status: Status) -> dict[str, list[str]]:
            return {"host": ["h"]}

        async def inject(self, fault: Fault, status: Status) -> Harm:
            return Harm(trouble=f"{fault.kind} of a host")

    both = Injectors(AdminInjector(Doors(["a:1"], "")), Hosts())
    assert both.targets(_status())["host"] == ["h"]
    assert both.targets(_status())["controller"] == ["controller"]
    assert (await both.inject(Fault("cut", "host", ("h",)), _status())).trouble == "cut of a host"
    with pytest.raises(ChaosError, match="nobody can"):
        await both.inject(Fault("kill", "moon", ("m",)), _status())


async def test_front_doors_are_asked_in_turn() -> None:
    doors = Doors(["127.0.0.1:1", "127.0.0.1:2"], "key")
    with pytest.raises(ChaosError, match=r"127.0.0.1:1, 127.0.0.1:2"):
        await doors.status(tries=1)
