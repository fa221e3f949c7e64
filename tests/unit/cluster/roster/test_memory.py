"""What a roster leaves to the next one is the same when it is read."""

from __future__ import annotations

from cluster.app.memory import Kept, decode, encode
from cluster.front_door.groups import GroupAddress
from cluster.orders import News, Orders
from cluster.roster import Decisions, Roster


def test_what_is_kept_comes_back() -> None:
    orders = Orders()
    orders.tell(orders.give("rollout", bytes(range(256))), News("running", "é"))
    decisions = Decisions(leaving=(("engine-0/1", 2.5),), weights=(("2", 0.1),), closing=(("10.0.0.1", 3.0),))
    groups = (GroupAddress(key="engine-0/1", engine="engine-0", dp_group=1, host="10.0.0.1", port=4711, generation=3),)
    kept = Kept(decisions=decisions, orders=orders.kept(), groups=groups)
    assert decode(encode(kept)) == kept


def test_the_next_roster_has_decided_the_same() -> None:
    first = Roster(lambda: 1.0, lease_s=5.0, reap_after_s=30.0)
    first.leave(("engine-0/0",), 7.0)
    first.close_doors("10.0.0.1", 3.0)
    second = Roster(lambda: 2.0, lease_s=5.0, reap_after_s=30.0, decisions=first.decisions)
    assert second.snapshot().decisions == first.decisions
    assert second.snapshot().version != first.snapshot().version, "who followed the first hears of the second"
    second.open_doors("10.0.0.1")
    second.stay(("engine-0/0",))
    assert second.decisions == Decisions()
