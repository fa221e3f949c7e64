"""Another version of the engines, without a failed request: one by one, all at once, or a few first.

    rolling      a new engine comes, is watched, an old one goes; again until none is old
    blue-green   all new engines come beside the old ones, get all requests, are watched; then the old ones go
    canary       one new engine gets a share of the requests and is watched; then as rolling

A new version takes no request before it has answered with a token of its own. One that fails more often, or makes
clients wait longer, than the limits allow is taken back, and the old one goes on as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.app.spec import ClusterSpec
from cluster.operations.fleet import Fleet
from cluster.operations.judge import Limits, judge, since, tallies
from cluster.operations.world import OperationFailed, Tell

__all__ = ["STRATEGIES", "Rollout", "roll_out"]

STRATEGIES = ("rolling", "blue-green", "canary")
_LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """`weight` is the canary's share of the requests; each step is watched for `watch_s`."""

    strategy: str
    spec: ClusterSpec
    weight: float = 0.1
    watch_s: float = 10.0
    limits: Limits = field(default_factory=Limits)


def roll_out(fleet: Fleet, rollout: Rollout, tell: Tell) -> None:
    """Raises OperationFailed, and then the old version serves as before."""
    if rollout.strategy not in STRATEGIES:
        raise OperationFailed(f"strategy must be one of {', '.join(STRATEGIES)}, not {rollout.strategy!r}")
    if not 0 < rollout.weight < 1:
        raise OperationFailed(f"weight must be between 0 and 1, not {rollout.weight:g}")
    if rollout.spec.version in {spec.version for spec in fleet.specs.values()}:
        raise OperationFailed(f"version {rollout.spec.version} is served already; give the new one another name")
    steps = _Steps(fleet, rollout, tell)
    try:
        if rollout.strategy == "blue-green":
            steps.all_at_once()
        else:
            steps.one_by_one(canary=rollout.strategy == "canary")
    except OperationFailed as failure:
        raise OperationFailed(_taken_back(steps, rollout.spec.version, failure)) from None
    fleet.spec = rollout.spec
    tell(f"version {rollout.spec.version} serves alone: {', '.join(fleet.names)}")


def _taken_back(steps: _Steps, version: str, failure: OperationFailed) -> str:
    """Takes it back, and says how that went."""
    try:
        steps.take_back()
    except OperationFailed as worse:
        return f"version {version} failed: {failure}; and it could not be taken back: {worse}; look at `shoal status`"
    return f"version {version} was taken back: {failure}"


class _Steps:
    """The state of one rollout."""

    def __init__(self, fleet: Fleet, rollout: Rollout, tell: Tell) -> None:
        self._fleet = fleet
        self._rollout = rollout
        self._tell = tell
        self._old_spec = fleet.spec
        self._old = list(fleet.names)
        self._num = len(self._old)
        self._new: list[str] = []
        self._before = tallies(fleet.world.overview()[1])
        self._new_version = rollout.spec.version

    def all_at_once(self) -> None:
        self._share(0.0)
        self._come(self._num)
        self._share(1.0)
        self._watch()
        self._go(self._old)

    def one_by_one(self, *, canary: bool) -> None:
        for step in range(self._num):
            # Until it has answered, a newcomer gets nothing; those that came before keep their share.
            self._share(step / self._num)
            self._come(1)
            self._share(self._rollout.weight if canary and step == 0 else (step + 1) / self._num)
            if step == 0 or canary:
                self._watch()
            if canary and step == 0:
                self._share((step + 1) / self._num)
            self._go(self._old[:1])

    def take_back(self) -> None:
        """The old version gets everything again, in as many engines as before."""
        if self._old:
            self._share(0.0)
        missing = self._num - len(self._old)
        if missing:
            self._fleet.add(missing, self._old_spec, self._tell)
            self._share(0.0)
        if self._new:
            self._fleet.remove(self._new, self._old_spec.drain_timeout_s, self._tell)
        self._fleet.world.weigh(())

    def _come(self, count: int) -> None:
        self._new += self._fleet.add(count, self._rollout.spec, self._tell)

    def _go(self, names: list[str]) -> None:
        leaving = list(names)
        self._fleet.remove(leaving, self._old_spec.drain_timeout_s, self._tell)
        self._old = [name for name in self._old if name not in leaving]
        if not self._old:
            self._fleet.world.weigh(())

    def _share(self, new: float) -> None:
        """The new version's share of the requests."""
        self._fleet.world.weigh(((self._new_version, new), (self._old_spec.version, 1.0 - new)))
        self._tell(f"version {self._new_version} gets {new:.0%} of the requests")

    def _watch(self) -> None:
        world, limits = self._fleet.world, self._rollout.limits
        before = tallies(world.overview()[1])
        end_s = world.now_s() + self._rollout.watch_s
        self._tell(f"watching version {self._new_version} for {self._rollout.watch_s:g} s")
        while True:
            engines, doors = world.overview()
            now = tallies(doors)
            # The old version is judged by all of the rollout: it may have no requests any more.
            old, new = since(self._before, now, self._old_spec.version), since(before, now, self._new_version)
            reason = judge(old, new, limits)
            sick = [report.engine for report in engines if report.engine in self._new and report.error]
            if reason or sick:
                raise OperationFailed(reason or f"{', '.join(sick)} did not stay well")
            if world.now_s() >= end_s:
                break
            world.wait(_LOOK_S)
        self._tell(f"{new.num_begun} sequences on version {self._new_version}, {new.num_failed} failed")
