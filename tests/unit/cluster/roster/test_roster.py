"""The roster's bookkeeping, with a clock that the tests turn."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.front_door.groups import GroupAddress
from cluster.roster import Claim, Decisions, EngineReport, FrontDoorReport, Roster
from protos.shoal.v1 import admin_pb2

ENGINES = ("engine-0", "engine-1")
LEASE_S = 5.0
REAP_S = 30.0


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(settle_s: float = 0.0) -> tuple[Roster, Clock]:
    clock = Clock()
    return Roster(clock, lease_s=LEASE_S, reap_after_s=REAP_S, settle_s=settle_s), clock


def group(engine: str, generation: int = 1) -> GroupAddress:
    return GroupAddress(key=f"{engine}/0", engine=engine, dp_group=0, host="h", port=1, generation=generation)


def report(engine: str, leader: str, *groups: GroupAddress, generation: int = 1) -> EngineReport:
    status = admin_pb2.EngineStatus(name=engine, generation=generation)
    return EngineReport(engine=engine, leader=leader, groups=groups, status=status)


def test_each_leader_gets_an_engine_of_its_own() -> None:
    roster, _ = make()
    assert roster.claim("a", ENGINES) == Claim("engine-0", 0)
    assert roster.claim("b", ENGINES) == Claim("engine-1", 0)
    assert roster.claim("c", ENGINES) is None
    assert roster.claim("a", ENGINES) == Claim("engine-0", 0), "asking again changes nothing"


def test_groups_come_and_go_with_reports() -> None:
    roster, _ = make()
    roster.claim("a", ENGINES)
    before = roster.snapshot()
    assert roster.report_engine(report("engine-0", "a", group("engine-0")))
    after = roster.snapshot()
    assert after.groups == (group("engine-0"),)
    assert after.version > before.version
    assert roster.report_engine(report("engine-0", "a", group("engine-0")))
    assert roster.snapshot().version == after.version, "nothing new"
    assert roster.report_engine(report("engine-0", "a"))
    assert roster.snapshot().groups == ()
    assert roster.snapshot().version > after.version


def test_groups_outlive_their_leader_until_the_next_one_knows_better() -> None:
    roster, clock = make()
    roster.claim("a", ENGINES)
    roster.report_engine(replace(report("engine-0", "a", group("engine-0")), lost=("h:9",)))
    before = roster.snapshot()
    clock.now_s += LEASE_S
    assert roster.engines() == ()
    assert roster.claim("b", ENGINES) == Claim("engine-0", 1)
    assert roster.report_engine(replace(report("engine-0", "b"), groups=None, lost=("h:9",)))
    assert roster.snapshot() == before, "front doors noticed nothing"
    assert roster.report_engine(report("engine-0", "b", group("engine-0", 2)))
    assert roster.snapshot().groups == (group("engine-0", 2),)


def test_groups_without_a_leader_go_when_their_engine_is_taken_down() -> None:
    roster, clock = make()
    roster.claim("a", ENGINES)
    roster.report_engine(report("engine-0", "a", group("engine-0")))
    clock.now_s += LEASE_S + REAP_S
    assert roster.snapshot().groups == (group("engine-0"),)
    assert roster.take_abandoned() == ("engine-0",)
    assert roster.snapshot().groups == ()


def test_an_orphan_is_claimed_first_and_with_its_generation() -> None:
    roster, clock = make()
    roster.claim("a", ENGINES)
    roster.claim("b", ENGINES)
    roster.report_engine(report("engine-1", "b", generation=7))
    clock.now_s += LEASE_S - 1
    roster.report_engine(report("engine-0", "a"))
    clock.now_s += 1
    assert roster.claim("c", ENGINES) == Claim("engine-1", 7)


def test_a_leader_that_lost_its_engine_is_told() -> None:
    roster, clock = make()
    roster.claim("a", ENGINES)
    clock.now_s += LEASE_S
    assert roster.claim("b", ENGINES) == Claim("engine-0", 0)
    assert not roster.report_engine(report("engine-0", "a", group("engine-0")))
    assert roster.snapshot().groups == ()
    assert roster.report_engine(report("engine-0", "b", group("engine-0", 2)))


def test_a_roster_that_was_restarted_learns_from_reports_before_it_gives_anything_away() -> None:
    roster, clock = make(settle_s=LEASE_S)
    assert roster.claim("new", ENGINES) is None
    assert roster.report_engine(report("engine-0", "old", group("engine-0", 4), generation=4))
    assert roster.snapshot().groups == (group("engine-0", 4),)
    clock.now_s += LEASE_S - 1
    roster.report_engine(report("engine-0", "old", group("engine-0", 4), generation=4))
    clock.now_s += 1
    assert roster.claim("new", ENGINES) == Claim("engine-1", 0)


def test_groups_outlive_their_leader_and_the_roster_together() -> None:
    """As when a host dies that has both: until another leader has looked, they go on."""
    clock = Clock()
    kept = (group("engine-0", 4), group("engine-1", 2))
    roster = Roster(clock, lease_s=LEASE_S, reap_after_s=REAP_S, settle_s=LEASE_S, groups=kept)
    assert roster.snapshot().groups == kept
    assert roster.engines() == (), "nobody leads them"
    assert roster.report_engine(report("engine-1", "old", generation=2)), "whose leader lives goes on with it"
    assert roster.snapshot().groups == kept[:1]
    assert roster.claim("new", ENGINES) is None
    clock.now_s += LEASE_S - 1
    roster.report_engine(report("engine-1", "old", generation=2))
    clock.now_s += 1
    assert roster.claim("new", ENGINES) == Claim("engine-0", 4)
    assert roster.report_engine(replace(report("engine-0", "new"), groups=None))
    assert roster.snapshot().groups == kept[:1]
    assert roster.report_engine(report("engine-0", "new", group("engine-0", 5), generation=5))
    assert roster.snapshot().groups == (group("engine-0", 5),)


def test_groups_that_no_leader_comes_for_go_in_the_end() -> None:
    clock = Clock()
    roster = Roster(clock, lease_s=LEASE_S, reap_after_s=REAP_S, groups=(group("engine-0", 4),))
    clock.now_s += LEASE_S + REAP_S
    assert roster.take_abandoned() == ("engine-0",)
    assert roster.snapshot().groups == ()


def test_what_nobody_leads_is_given_out_once_to_be_taken_down() -> None:
    roster, clock = make()
    roster.claim("a", ENGINES)
    clock.now_s += LEASE_S + REAP_S - 0.1
    assert roster.take_abandoned() == ()
    clock.now_s += 0.1
    assert roster.take_abandoned() == ("engine-0",)
    assert roster.take_abandoned() == ()
    assert roster.claim("b", ENGINES) == Claim("engine-0", 0)


def test_a_released_engine_is_free_at_once_and_not_reaped() -> None:
    roster, clock = make()
    roster.claim("a", ENGINES)
    roster.report_engine(report("engine-0", "a", group("engine-0")))
    roster.release("a")
    assert roster.snapshot().groups == ()
    clock.now_s += 10 * REAP_S
    assert roster.take_abandoned() == ()


def test_front_doors_are_forgotten_when_they_are_silent() -> None:
    roster, clock = make()
    roster.report_front_door(FrontDoorReport(id="x", node="n"))
    roster.report_front_door(FrontDoorReport(id="y", node="n"))
    roster.remove_front_door("y")
    roster.remove_front_door("never seen")
    assert [door.id for door in roster.front_doors()] == ["x"]
    clock.now_s += LEASE_S
    assert roster.front_doors() == ()


def test_draining_is_news() -> None:
    roster, _ = make()
    version = roster.snapshot().version
    roster.drain()
    assert roster.decisions.draining
    assert roster.snapshot().version > version


def test_an_engine_that_is_only_claimed_is_shown_as_that() -> None:
    roster, _ = make()
    roster.claim("a", ("engine-0",))
    (found,) = roster.engines()
    assert (found.status.name, found.status.state) == ("engine-0", "claiming")


def test_groups_that_leave_are_not_given_to_front_doors() -> None:
    roster, _ = make()
    roster.claim("a", ("engine-0",))
    roster.report_engine(report("engine-0", "a", group("engine-0")))
    version = roster.snapshot().version
    roster.leave(("engine-0/0",), 7.0)
    assert roster.snapshot().groups == ()
    assert roster.decisions.leaving == (("engine-0/0", 7.0),)
    assert roster.snapshot().version > version
    roster.stay(("engine-0/0",))
    assert roster.snapshot().groups == (group("engine-0"),)
    assert roster.decisions == Decisions()
    roster.weigh((("2", 0.5),))
    assert roster.decisions.weights == (("2", 0.5),)
