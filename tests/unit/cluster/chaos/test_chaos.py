"""Faults from a seed, and what the records of streams say about them."""

from __future__ import annotations

import random

import pytest

from cluster.chaos.campaign import targets, whole, works
from cluster.chaos.load import StreamRecord, Work
from cluster.chaos.report import as_html, as_json, as_lines
from cluster.chaos.schedule import Fault, Plan, draw, parse_weights
from cluster.chaos.verdict import Hit, percentile, verdict
from protos.shoal.v1 import admin_pb2

THERE = {"rank": ["e/rank-0", "e/rank-1", "e/rank-2"], "leader": ["e/leader"], "front-door": []}
WORK = Work("a", 1, 4)


def test_faults_follow_from_the_seed() -> None:
    plan = Plan(roles={"rank": 2, "leader": 1, "front-door": 1}, kinds={"kill": 1, "freeze": 1, "slow": 1}, double=0.5)

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
        draw(Plan(roles={"front-door": 1}, kinds={"kill": 1}), random.Random(0), THERE)


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


def _record(start_s: float, *, pause_s: float = 0.0, paused_at_s: float = 0.0, **more: object) -> StreamRecord:
    record = StreamRecord(WORK, start_s, ended_s=start_s + 4, token_ids=[1, 2, 3, 4], **more)  # type: ignore[arg-type]
    record.arrivals = [(start_s + at, 1) for at in range(4)]
    record.pause_s, record.paused_at_s = pause_s, paused_at_s
    return record


def test_the_verdict_counts_what_clients_saw() -> None:
    kill = Hit(Fault("kill", "rank", ("e/rank-0",)), 10.0, 12.0)
    freeze = Hit(Fault("freeze", "leader", ("e/leader",), 5.0), 20.0, 25.0)
    records = [
        _record(0.0),
        _record(9.0, pause_s=1.5, paused_at_s=9.9),
        _record(19.0, pause_s=0.1, paused_at_s=19.9),
        _record(21.0, error="UNAVAILABLE: no"),
        _record(22.0, broken="repeated"),
        _record(23.0, broken="skipped"),
    ]
    records[0].token_ids = [9, 9, 9, 9]
    found = verdict(records, [kill, freeze], seed=3, began_s=0.0, ended_s=30.0, expected={WORK: [1, 2, 3, 4]})
    assert (found.num_started, found.num_finished, found.num_lost) == (6, 3, 1)
    assert (found.num_repeated, found.num_skipped, found.num_differing) == (1, 1, 1)
    assert not found.clean
    assert found.pauses.count == 1
    assert found.pauses.max_s == 1.5
    assert list(found.pauses_by_fault) == ["kill rank"], "short waits are the engine's pace"
    assert found.heal_by_fault["kill rank"].max_s == 2.0
    assert found.tokens_per_s["before"] == pytest.approx(5 / 10)
    assert set(found.tokens_per_s) == {"before", "during", "after"}


def test_a_pause_belongs_to_the_fault_that_began_it() -> None:
    hits = [Hit(Fault("kill", role, (role,)), at_s, at_s + 2) for role, at_s in (("rank", 10.0), ("roster", 13.0))]
    records = [
        _record(9.0, pause_s=4.0, paused_at_s=9.5),  # begins before the rank's death, ends behind the roster's
        _record(9.0, pause_s=1.0, paused_at_s=12.5),
        _record(9.0, pause_s=2.0, paused_at_s=14.0),
    ]
    found = verdict(records, hits, seed=0, began_s=0.0, ended_s=20.0, expected=None)
    assert {kind: pauses.count for kind, pauses in found.pauses_by_fault.items()} == {"kill rank": 1, "kill roster": 2}


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


def _status(*, state: str = "ready", pid: int = 7, num_groups: int = 1) -> admin_pb2.StatusResponse:
    engine = admin_pb2.EngineStatus(name="e", state=state, leader_pid=5)
    engine.ranks.add(rank=0, pid=pid)
    engine.dp_groups.add(index=0)
    status = admin_pb2.StatusResponse(engines=[engine])
    status.front_doors.add(id="d", pid=6, dp_groups=["e/0"] * num_groups)
    return status


def test_a_cluster_is_whole_when_all_is_there_and_ready() -> None:
    before = _status()
    assert whole(_status(pid=8), before, frozenset({7}))
    assert not whole(_status(), before, frozenset({7})), "the dead rank is still counted"
    assert not whole(_status(state="loading"), before, frozenset())
    assert not whole(_status(num_groups=0), before, frozenset()), "a front door has no stream to it yet"
    assert not whole(admin_pb2.StatusResponse(), before, frozenset())
    assert targets(before)["front-door"] == ["front-door/d"]
