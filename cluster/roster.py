"""Who is there: which leader holds which engine, where the DP groups listen, which front doors are open.

Leaders and front doors report themselves again and again, and what is not reported for a lease is forgotten; so a
roster that was restarted knows all of them again after one round of reports. What an operator has decided nobody
reports: that is `Decisions`, which whoever runs the roster keeps for the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.engine.states import EngineState
from cluster.front_door.groups import GroupAddress
from protos.shoal.v1 import admin_pb2

__all__ = ["Claim", "Decisions", "EngineReport", "FrontDoorReport", "GroupTraffic", "Roster", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Claim:
    """An engine given to a leader, and the last generation it is known to have had (0: none)."""

    engine: str
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """What a leader says of its engine. `groups` is empty unless the engine takes requests, and None while a new leader
    has yet to see which of those before it go on."""

    engine: str
    leader: str
    version: str = ""
    groups: tuple[GroupAddress, ...] | None = ()
    status: admin_pb2.EngineStatus = field(default_factory=admin_pb2.EngineStatus)
    progress: float = 0.0  # of loading, 0 to 1
    error: str = ""  # what went wrong last, in one line
    pid: int = 0  # the leader's, on `node`
    node: str = ""
    refused: bool = False  # the error is the user's to mend: the settings or the model
    lost: tuple[str, ...] = ()  # addresses of DP groups that are over, whatever their streams say


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTraffic:
    """A DP group as one front door sees it: what of its own runs there, what the group said of its load last, and
    counts since the front door knows the group, which only rise."""

    key: str
    engine: str
    version: str
    num_open: int
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_begun: int = 0
    num_failed: int = 0
    num_first_tokens: int = 0
    first_tokens_s: float = 0.0  # all of them together, from submit to first token


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontDoorReport:
    """What a front door says of itself."""

    id: str
    node: str
    pid: int = 0
    open_requests: int = 0
    ready: bool = False
    draining: bool = False  # takes no new request
    drained: bool = False  # and has none any more
    error: str = ""
    dp_groups: tuple[str, ...] = ()
    traffic: tuple[GroupTraffic, ...] = ()  # also of groups that have left the roster, while something runs there


@dataclass(frozen=True, kw_only=True, slots=True)
class Decisions:
    """What operators want of front doors, until they want something else."""

    draining: bool = False  # all of them finish what is open
    leaving: tuple[tuple[str, float], ...] = ()  # groups' keys, and in how many seconds what runs there is handed over
    weights: tuple[tuple[str, float], ...] = ()  # versions of engines, and their shares of the requests
    closing: tuple[tuple[str, float], ...] = ()  # nodes whose front doors close, and in how many seconds at most


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What front doors act on; `version` rises with every change of the rest."""

    version: int
    groups: tuple[GroupAddress, ...]
    decisions: Decisions = field(default_factory=Decisions)
    lost: tuple[str, ...] = ()  # addresses of DP groups whose streams are to be given up


@dataclass(slots=True)
class _Engine:
    report: EngineReport
    seen_s: float


class Roster:
    """The bookkeeping alone: no clock of its own, no tasks, no Ray.

    A lease that is not renewed for `lease_s` is over: its engine may be claimed by another leader, and what nobody
    claimed for another `reap_after_s` is handed out by `take_abandoned`. Until then its groups stay in the snapshot,
    because ranks outlive their leader: front doors see for themselves who answers. A roster
    that was restarted passes `settle_s`: until then nothing is claimed that may have a leader who has yet to report;
    and the `decisions` of the one before.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        lease_s: float,
        reap_after_s: float,
        settle_s: float = 0.0,
        decisions: Decisions | None = None,
        groups: tuple[GroupAddress, ...] = (),
    ) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._reap_after_s = reap_after_s
        self._settled_at_s = clock() + settle_s
        self._engines: dict[str, _Engine] = {}
        self._front_doors: dict[str, tuple[FrontDoorReport, float]] = {}
        # Whoever followed the roster before this one must not take its first version for one that was seen.
        self._snapshot = Snapshot(int(clock() * 1000), (), decisions or Decisions())
        for name in {group.engine for group in groups}:
            self._engines[name] = _Engine(_unled(name, tuple(one for one in groups if one.engine == name)), clock())
        self._refresh()

    def claim(self, leader: str, engines: tuple[str, ...]) -> Claim | None:
        """Gives `leader` one of `engines` that nobody leads: those that were led before come first, because their
        ranks may still live. None where there is none, or not yet."""
        for engine in self._engines.values():
            if engine.report.leader == leader:
                return _claim(engine.report)
        if self._clock() < self._settled_at_s:
            return None
        orphans = [name for name in engines if name in self._engines and not self._alive(self._engines[name])]
        unknown = [name for name in engines if name not in self._engines]
        for name in (*orphans, *unknown):
            known = self._engines[name].report if name in self._engines else _unled(name)
            report = replace(_unled(name, known.groups or ()), leader=leader, status=known.status, lost=known.lost)
            self._engines[name] = _Engine(report, self._clock())
            self._refresh()
            return _claim(report)
        return None

    def report_engine(self, report: EngineReport) -> bool:
        """Renews the leader's lease. False where another leader holds the engine: then this one must go."""
        engine = self._engines.get(report.engine)
        if engine is not None and engine.report.leader != report.leader and self._alive(engine):
            return False
        if report.groups is None:
            report = replace(report, groups=engine.report.groups if engine is not None else ())
        self._engines[report.engine] = _Engine(report, self._clock())
        self._refresh()
        return True

    def release(self, leader: str) -> None:
        """The leader has gone and left nothing behind."""
        self._engines = {name: engine for name, engine in self._engines.items() if engine.report.leader != leader}
        self._refresh()

    def report_front_door(self, report: FrontDoorReport) -> None:
        self._front_doors[report.id] = (report, self._clock())

    def remove_front_door(self, front_door: str) -> None:
        self._front_doors.pop(front_door, None)

    def drain(self) -> None:
        """Every front door is to refuse new requests and finish its open ones."""
        self._decide(draining=True)

    def close_doors(self, node: str, timeout_s: float) -> None:
        """The same for the front doors of a node, those too that are yet to come."""
        self._decide(closing=(*_without(self.decisions.closing, (node,)), (node, timeout_s)))

    def open_doors(self, node: str) -> None:
        """The opposite."""
        self._decide(closing=_without(self.decisions.closing, (node,)))

    def leave(self, keys: tuple[str, ...], timeout_s: float) -> None:
        """Groups that get nothing new; what still runs there after `timeout_s` goes on elsewhere."""
        kept = _without(self.decisions.leaving, keys)
        self._decide(leaving=(*kept, *((key, timeout_s) for key in keys)))
        self._refresh()

    def stay(self, keys: tuple[str, ...]) -> None:
        """The opposite."""
        self._decide(leaving=_without(self.decisions.leaving, keys))
        self._refresh()

    def weigh(self, weights: tuple[tuple[str, float], ...]) -> None:
        """Shares of the requests by version; a version that is not named has the share 1."""
        self._decide(weights=weights)

    @property
    def decisions(self) -> Decisions:
        return self._snapshot.decisions

    @property
    def groups(self) -> tuple[GroupAddress, ...]:
        """Those of all engines, with those that are leaving."""
        reports = [engine.report for _, engine in sorted(self._engines.items())]
        return tuple(group for report in reports for group in report.groups or ())

    def snapshot(self) -> Snapshot:
        self._refresh()
        return self._snapshot

    def engines(self) -> tuple[EngineReport, ...]:
        """Those with a living leader, by name."""
        return tuple(engine.report for _, engine in sorted(self._engines.items()) if self._alive(engine))

    def front_doors(self) -> tuple[FrontDoorReport, ...]:
        now = self._clock()
        self._front_doors = {
            key: (report, seen_s) for key, (report, seen_s) in self._front_doors.items() if now - seen_s < self._lease_s
        }
        return tuple(report for _, (report, _) in sorted(self._front_doors.items()))

    def take_abandoned(self) -> tuple[str, ...]:
        """Engines to be taken down, because no leader came for them; each is given out once."""
        limit = self._clock() - self._lease_s - self._reap_after_s
        names = [name for name, engine in self._engines.items() if engine.seen_s <= limit]
        for name in names:
            del self._engines[name]
        return tuple(names)

    def _alive(self, engine: _Engine) -> bool:
        return bool(engine.report.leader) and self._clock() - engine.seen_s < self._lease_s

    def _refresh(self) -> None:
        leaving = {key for key, _ in self.decisions.leaving}
        reports = [engine.report for _, engine in sorted(self._engines.items())]
        groups = tuple(group for group in self.groups if group.key not in leaving)
        lost = tuple(address for report in reports for address in report.lost)
        if (groups, lost) != (self._snapshot.groups, self._snapshot.lost):
            self._set(groups=groups, lost=lost)

    def _decide(self, **changes: object) -> None:
        self._set(decisions=replace(self.decisions, **changes))  # type: ignore[arg-type]

    def _set(self, **changes: object) -> None:
        self._snapshot = replace(self._snapshot, version=self._snapshot.version + 1, **changes)  # type: ignore[arg-type]


def _without(entries: tuple[tuple[str, float], ...], names: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    return tuple(entry for entry in entries if entry[0] not in names)


def _unled(engine: str, groups: tuple[GroupAddress, ...] = ()) -> EngineReport:
    """Of an engine that no leader has reported: with these groups an earlier roster knew it."""
    generation = max((group.generation for group in groups), default=0)
    status = admin_pb2.EngineStatus(name=engine, state=EngineState.CLAIMING, generation=generation)
    return EngineReport(engine=engine, leader="", groups=groups, status=status)


def _claim(report: EngineReport) -> Claim:
    return Claim(report.engine, report.status.generation)
