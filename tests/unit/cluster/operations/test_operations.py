"""Engines come and go, and at every moment there is one that takes requests."""

from __future__ import annotations

import pytest

from cluster.operations.autoscale import loads_of
from cluster.operations.drain import drain
from cluster.operations.fleet import Fleet
from cluster.operations.judge import Limits, Tally, judge, since, tallies
from cluster.operations.rollout import Rollout, roll_out
from cluster.operations.scale import scale
from cluster.operations.world import OperationFailed
from cluster.orders import News, Orders
from cluster.roster import FrontDoorReport, GroupTraffic
from protos.shoal.v1 import admin_pb2
from tests.unit.cluster.operations.fake_world import FakeWorld, spec


def _fleet(engines: int = 2) -> tuple[Fleet, FakeWorld]:
    first = spec(engines=engines)
    world = FakeWorld(first)
    return Fleet(first, world), world


def test_a_drained_engine_leaves_empty() -> None:
    fleet, world = _fleet()
    lines: list[str] = []
    drain(fleet, admin_pb2.DrainRequest(target="engine-0"), lines.append)
    assert world.log == ["stop engine-0"]
    assert list(fleet.names) == ["engine-1"]
    assert world.left == {}, "what has gone is not remembered"
    assert lines[-1] == "engine-0 has left"


def test_what_does_not_end_in_time_is_handed_over() -> None:
    fleet, world = _fleet()
    world.linger_s = 8.0  # the front doors hand over after 3 s; that shows in the reports a while later
    drain(fleet, admin_pb2.DrainRequest(target="engine-0", timeout_s=3), lambda line: None)
    assert world.time_s - 100.0 >= 8.0
    assert list(fleet.names) == ["engine-1"]


def test_a_node_is_drained_of_its_engines() -> None:
    fleet, world = _fleet(3)
    drain(fleet, admin_pb2.DrainRequest(target="10.0.0.1"), lambda line: None)
    assert list(fleet.names) == ["engine-0", "engine-2"]
    assert world.log == ["close 10.0.0.1", "stop engine-1"], "clients go elsewhere first"
    assert world.time_s - 100.0 >= 2 * world.linger_s, "both were waited for"
    with pytest.raises(OperationFailed, match=r"only front doors are on 10\.0\.0\.0"):
        drain(fleet, admin_pb2.DrainRequest(target="10.0.0.0"), lambda line: None)
    assert list(world.closed) == ["10.0.0.1"]
    drain(fleet, admin_pb2.DrainRequest(target="10.0.0.1", undo=True), lambda line: None)
    assert world.closed == {}


def test_a_node_with_front_doors_alone_is_drained_of_them() -> None:
    fleet, world = _fleet()
    world.doors.append("10.0.0.9")
    drain(fleet, admin_pb2.DrainRequest(target="10.0.0.9"), lambda line: None)
    assert (world.log, list(fleet.names)) == (["close 10.0.0.9"], ["engine-0", "engine-1"])


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("engine-01", "the nearest is engine-1"),
        ("engine0/rank-0", "the nearest is engine-0/rank-0"),
        ("10.0.0.11", "the nearest is 10.0.0.1"),
        ("elsewhere", "there are engine-0, engine-1, 10.0.0.0, 10.0.0.1, engine-0/rank-0, engine-1/rank-0"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(target: str, says: str) -> None:
    fleet, _ = _fleet()
    with pytest.raises(OperationFailed, match=says):
        drain(fleet, admin_pb2.DrainRequest(target=target), lambda line: None)


def test_a_ranks_group_takes_nothing_until_it_is_undone() -> None:
    fleet, world = _fleet()
    drain(fleet, admin_pb2.DrainRequest(target="engine-1/rank-0"), lambda line: None)
    assert list(world.left) == ["engine-1/0"]
    assert world.log == []
    drain(fleet, admin_pb2.DrainRequest(target="engine-1/rank-0", undo=True), lambda line: None)
    assert world.left == {}


def test_the_last_engine_stays_unless_forced() -> None:
    fleet, world = _fleet(1)
    for target in ("engine-0", "engine-0/rank-0"):
        with pytest.raises(OperationFailed, match="shoal scale"):
            drain(fleet, admin_pb2.DrainRequest(target=target), lambda line: None)
    assert world.left == {}
    with pytest.raises(OperationFailed, match="'engine-7'"):
        drain(fleet, admin_pb2.DrainRequest(target="engine-7"), lambda line: None)


def test_scaling_starts_new_engines_and_ends_the_newest() -> None:
    fleet, world = _fleet()
    scale(fleet, 4, lambda line: None)
    assert list(fleet.names) == ["engine-0", "engine-1", "engine-2", "engine-3"]
    scale(fleet, 1, lambda line: None)
    assert list(fleet.names) == ["engine-0"]
    scale(fleet, 2, lambda line: None)
    assert list(fleet.names) == ["engine-0", "engine-4"], "a name is not used twice"
    assert world.log[-1] == "start engine-4"
    with pytest.raises(OperationFailed, match="at least one"):
        scale(fleet, 0, lambda line: None)


def test_what_has_no_room_leaves_all_as_it_was() -> None:
    fleet, world = _fleet()
    world.room = 3
    with pytest.raises(OperationFailed, match="no room"):
        scale(fleet, 4, lambda line: None)
    assert list(fleet.names) == ["engine-0", "engine-1"]
    assert sorted(world.engines) == ["engine-0", "engine-1"]


@pytest.mark.parametrize("watch_s", [10.0, 0.0])
@pytest.mark.parametrize("strategy", ["rolling", "blue-green", "canary"])
def test_another_version_takes_over(strategy: str, watch_s: float) -> None:
    fleet, world = _fleet()
    lines: list[str] = []
    roll_out(fleet, Rollout(strategy=strategy, spec=spec(version="2"), watch_s=watch_s), lines.append)
    assert {engine.version for engine in world.engines.values()} == {"2"}
    assert len(world.engines) == 2
    assert fleet.spec.version == "2"
    assert world.least_serving >= 2, "never fewer engines than before"
    assert (world.weights, world.left) == ({}, {})
    assert "serves alone" in lines[-1]


@pytest.mark.parametrize("strategy", ["rolling", "blue-green", "canary"])
@pytest.mark.parametrize("trouble", ["errors", "slow", "doomed"])
def test_a_bad_version_is_taken_back(strategy: str, trouble: str) -> None:
    fleet, world = _fleet()
    if trouble == "errors":
        world.errors["2"] = 0.5
    elif trouble == "slow":
        world.first_token_s["2"] = 5.0
    else:
        world.doomed.add("2")
    rollout = Rollout(strategy=strategy, spec=spec(version="2"), weight=0.5)
    says = {"errors": "failed, more than", "slow": "first token takes", "doomed": "no such weights"}[trouble]
    with pytest.raises(OperationFailed, match=says):
        roll_out(fleet, rollout, lambda line: None)
    assert {engine.version for engine in world.engines.values()} == {"1"}
    assert len(world.engines) == 2
    assert (fleet.spec.version, world.weights, world.left) == ("1", {}, {})


def test_what_cannot_be_rolled_out_is_refused_at_once() -> None:
    fleet, world = _fleet()
    for wrong, says in (
        (Rollout(strategy="big-bang", spec=spec(version="2")), "blue-green"),
        (Rollout(strategy="canary", spec=spec(version="2"), weight=1.5), "weight"),
        (Rollout(strategy="canary", spec=spec(version="1")), "already"),
    ):
        with pytest.raises(OperationFailed, match=says):
            roll_out(fleet, wrong, lambda line: None)
    assert world.log == []


def test_a_judgement_needs_enough_to_go_by() -> None:
    limits = Limits(max_error_rate=0.1, max_slowdown=2.0)
    good = Tally(100, 0, 100, 10.0)
    assert judge(good, Tally(4, 4, 0, 0.0), limits) == ""
    assert "5 of 10" in judge(good, Tally(10, 5, 5, 0.5), limits)
    assert judge(Tally(100, 60, 100, 10.0), Tally(10, 5, 5, 0.5), limits) == "", "the old one is no better"
    assert judge(good, Tally(10, 1, 10, 2.0), limits) == ""
    assert "first token" in judge(good, Tally(10, 1, 10, 2.1), limits)
    assert judge(Tally(), Tally(10, 0, 10, 50.0), limits) == "", "nothing to compare with"


def _door(num_begun: int, *, id: str = "a", version: str = "2") -> FrontDoorReport:
    group = GroupTraffic(key="e/0", engine="e", version=version, num_open=0, num_begun=num_begun)
    return FrontDoorReport(id=id, node="n", traffic=(group,))


def test_counters_that_fell_began_at_nothing() -> None:
    before = tallies([_door(50)])
    assert since(before, tallies([_door(60)]), "2").num_begun == 10
    assert since(before, tallies([_door(7)]), "2").num_begun == 7
    assert since(before, tallies([_door(50), _door(3, id="b")]), "2").num_begun == 3
    assert since(before, tallies([_door(60)]), "1").num_begun == 0


def test_loads_are_those_of_ready_engines() -> None:
    _, world = _fleet()
    world.start_engine("engine-2", spec())
    loads = loads_of(*world.overview(), names=("engine-0", "engine-1", "engine-2"))
    assert (loads.num_ready, loads.num_coming, loads.num_blocks) == (2, 1, 200)


def test_orders_wait_in_line_and_their_news_is_kept() -> None:
    orders = Orders()
    first, second = orders.give("drain", b"a"), orders.give("scale", b"b")
    taken = orders.take()
    assert taken is not None
    assert (taken.number, taken.kind, taken.request) == (first, "drain", b"a")
    orders.tell(first, News("running", "x"))
    orders.tell(first, News("done", "y"))
    assert [news.line for news in orders.news(first, 0) or ()] == ["x", "y"]
    assert [news.line for news in orders.news(first, 1) or ()] == ["y"]
    assert orders.news(second, 0) == ()
    assert orders.news(99, 0) is None
    for _ in range(40):
        number = orders.give("scale", b"")
        orders.tell(number, News("done", ""))
    assert orders.news(first, 0) is None, "old ones are forgotten"
    assert orders.news(second, 0) == (), "but none that is not over"


def test_what_cannot_be_taken_back_says_why_it_began() -> None:
    fleet, world = _fleet()

    def no_more(line: str) -> None:
        if line.startswith("engine-0 has left"):
            world.errors["2"] = 0.5
            world.room = 3  # for the next of the new version, and not for the old one to come back

    with pytest.raises(OperationFailed, match=r"failed, more than.*could not be taken back: no room"):
        roll_out(fleet, Rollout(strategy="canary", spec=spec(version="2"), weight=0.5, watch_s=2.0), no_more)


def test_orders_outlive_whoever_keeps_them() -> None:
    orders = Orders()
    first, second = orders.give("drain", b"\x00\xff"), orders.give("scale", b"b")
    orders.take()
    orders.tell(first, News("running", "x"))
    again = Orders(orders.kept())
    again.tell(first, News("done", "y"))
    assert [news.line for news in again.news(first, 0) or ()] == ["x", "y"], "who carries it out has lived on"
    taken = again.take()
    assert taken is not None
    assert taken.number == second
    assert again.give("scale", b"") == second + 1
