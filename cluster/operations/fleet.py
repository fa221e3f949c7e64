"""The engines that there should be, and how one comes and goes without a request noticing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.app.names import engine_names
from cluster.app.spec import ClusterSpec
from cluster.engine.states import EngineState
from cluster.operations.world import OperationFailed, Tell, World
from cluster.roster import EngineReport, FrontDoorReport

__all__ = ["Fleet"]

Holds = Callable[[Sequence[EngineReport], Sequence[FrontDoorReport]], bool]

_LOOK_S = 0.25
_START_S = 120.0  # beside loading
_HAND_OVER_S = 10.0  # for what was handed over to be gone, and for the news of it


class Fleet:
    """`spec` is what new engines are started with. Belongs to whoever carries out operations, one at a time."""

    def __init__(self, spec: ClusterSpec, world: World) -> None:
        self.spec = spec
        self.world = world
        self.specs = dict.fromkeys(engine_names(spec.engines), spec)
        self._next = spec.engines

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.specs)

    def add(self, count: int, spec: ClusterSpec, tell: Tell) -> tuple[str, ...]:
        """Starts engines and waits until each has answered with a token and every front door can reach it.

        Raises OperationFailed, and then they are gone again.
        """
        names = tuple(f"engine-{self._next + index}" for index in range(count))
        self._next += count
        started = []
        try:
            for name in names:
                tell(f"starting {name} (version {spec.version})")
                self.world.start_engine(name, spec)
                started.append(name)
                self.specs[name] = spec
            self._await_ready(names, spec)
        except OperationFailed:
            for name in started:
                self._end(name)
            raise
        tell(f"{', '.join(names)} answered and can be reached by every front door")
        return names

    def remove(self, names: Sequence[str], timeout_s: float, tell: Tell) -> None:
        """Nothing new for these engines, then the end of each."""
        keys = self.keys_of(names)
        self.empty(keys, timeout_s, tell)
        for name in names:
            self._end(name)
            tell(f"{name} has left")
        self._await(lambda engines, doors: not any(report.engine in names for report in engines), _HAND_OVER_S)
        self.world.stay(keys)

    def empty(self, keys: Sequence[str], timeout_s: float, tell: Tell) -> None:
        """Nothing new for these DP groups; comes back when nothing runs there any more."""
        self.world.leave(keys, timeout_s)
        tell(f"{', '.join(keys)}: nothing new, up to {timeout_s:g} s for what runs")
        if not self._await(lambda engines, doors: _is_empty(doors, keys), timeout_s + _HAND_OVER_S):
            tell("a front door does not say that it has let go; its requests are replayed elsewhere")

    def closed(self, node: str, timeout_s: float) -> bool:
        """Waits for the node's front doors to be done with what was open; whether all said so."""
        return self._await(
            lambda engines, doors: all(door.drained for door in doors if door.node == node), timeout_s + _HAND_OVER_S
        )

    def keys_of(self, names: Sequence[str]) -> list[str]:
        """The DP groups of these engines."""
        return [
            f"{report.engine}/{group.index}"
            for report in self.world.overview()[0]
            if report.engine in names
            for group in report.status.dp_groups
        ]

    def ready(self, *, but: Sequence[str] = ()) -> list[str]:
        """Engines that take requests."""
        return [
            report.engine
            for report in self.world.overview()[0]
            if report.status.state == EngineState.READY and report.engine not in but
        ]

    def _end(self, name: str) -> None:
        self.world.stop_engine(name)
        self.specs.pop(name, None)

    def _await_ready(self, names: Sequence[str], spec: ClusterSpec) -> None:
        give_up_s = self.world.now_s() + spec.settings.load_timeout_s + _START_S
        while True:
            engines, doors = self.world.overview()
            ours = {report.engine: report for report in engines if report.engine in names}
            for report in ours.values():
                if report.status.state == EngineState.FAILED:
                    raise OperationFailed(f"{report.engine} cannot be served: {report.error}")
            if len(ours) == len(names) and all(_serves(report, spec, doors) for report in ours.values()):
                return
            if self.world.now_s() > give_up_s:
                states = ", ".join(f"{name} is {report.status.state}" for name, report in sorted(ours.items()))
                raise OperationFailed(f"the new engines are not ready in time: {states or 'none has a leader'}")
            self.world.wait(_LOOK_S)

    def _await(self, holds: Holds, timeout_s: float) -> bool:
        give_up_s = self.world.now_s() + timeout_s
        while not holds(*self.world.overview()):
            if self.world.now_s() > give_up_s:
                return False
            self.world.wait(_LOOK_S)
        return True


def _serves(report: EngineReport, spec: ClusterSpec, doors: Sequence[FrontDoorReport]) -> bool:
    """A leader says READY only behind a token that went through every rank."""
    if report.status.state != EngineState.READY or report.version != spec.version:
        return False
    keys = {f"{report.engine}/{group.index}" for group in report.status.dp_groups}
    return bool(keys) and all(keys <= set(door.dp_groups) for door in doors)


def _is_empty(doors: Sequence[FrontDoorReport], keys: Sequence[str]) -> bool:
    return not any(
        set(keys) & set(door.dp_groups) or any(group.key in keys and group.num_open for group in door.traffic)
        for door in doors
    )
