"""A run from its start to its end: the deployments up, their changes told, and everything taken down again."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from cluster.app.announcer import Announcer
from cluster.app.names import APP, app_name, engine_names
from cluster.app.patience import Patience
from cluster.app.preflight import look_before, look_why
from cluster.app.ray_session import RaySession
from cluster.app.spec import ClusterSpec
from cluster.engine.states import EngineState
from cluster.roster import EngineReport, FrontDoorReport

if TYPE_CHECKING:
    from cluster.app.operator import Operator  # brings Ray

__all__ = ["Run", "StartError"]

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25
_ROSTER_TIMEOUT_S = 10.0
_REPORTS_EVERY_S = 1.5
_TAKE_DOWN_S = 20.0  # with drained front doors Serve takes a second or two; it goes on without us


class StartError(Exception):
    """The cluster cannot serve; the message is for the user. `explained`: the logs would add nothing to it."""

    def __init__(self, message: str, *, explained: bool) -> None:
        super().__init__(message)
        self.explained = explained


class Run:
    """Belongs to the main thread; `stop` may be set by anybody."""

    def __init__(self, spec: ClusterSpec, session: RaySession, announcer: Announcer, stop: threading.Event) -> None:
        self._spec = spec
        self._session = session
        self._announcer = announcer
        self._stop = stop
        self._roster: Any = None
        self._operator: Operator | None = None

    def start(self) -> None:
        """Deploys; engines and front doors come up side by side."""
        from ray import serve
        from ray.serve.api import RunTarget, run_many

        from cluster.app.front_door import front_door_deployment
        from cluster.app.operator import Operator
        from cluster.engine.deployment import engine_deployment
        from cluster.roster_actor import start_roster

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if self._joined and (found := look_before(self._spec)):
            raise StartError("the cluster cannot run this model:\n" + "\n".join(map(str, found)), explained=True)
        self._roster = start_roster(self._spec.log_level)
        serve.start(proxy_location="Disabled")
        spec = self._spec
        doors = RunTarget(front_door_deployment(spec).bind(spec), name=APP, route_prefix=None)
        engines = [
            RunTarget(engine_deployment(spec).bind(spec, name), name=app_name(name), route_prefix=None)
            for name in engine_names(spec.engines)
        ]
        run_many([doors, *engines])
        self._operator = Operator(spec, self._roster, self._stop, self._announcer.line)

    def wait_until_ready(self) -> bool:
        """False where `stop` was set before. Raises StartError where it will never be."""
        patience = Patience(self._spec.start_timeout_s, time.monotonic)
        while not self._stop.is_set():
            engines, front_doors = self._look()
            self._raise_problems(engines, front_doors)
            if self._all_ready(engines, front_doors):
                return True
            if patience.ends(report.status.state for report in engines):
                raise self._overdue(engines, front_doors)
            self._stop.wait(_LOOK_EVERY_S)
        return False

    def doors(self) -> tuple[str, ...]:
        """The addresses of the nodes with front doors."""
        _, front_doors = self._look()
        return tuple(sorted({door.node for door in front_doors}))

    def serve(self) -> None:
        """Until `stop` is set. Raises StartError where every engine has failed for good."""
        assert self._operator is not None
        self._operator.start()
        while not self._stop.wait(_LOOK_EVERY_S * 2):
            engines, _ = self._look()
            if engines and all(report.status.state == EngineState.FAILED for report in engines):
                raise StartError(engines[0].error, explained=engines[0].refused)

    def drain(self) -> None:
        """Front doors refuse what is new and finish what is open, within the configured time."""
        import ray

        if self._roster is None:
            return
        if self._operator is not None:
            self._operator.join()
        ray.get(self._roster.drain.remote(), timeout=_ROSTER_TIMEOUT_S)
        began_s = time.monotonic()
        told = 0
        while time.monotonic() - began_s < self._spec.drain_timeout_s + 1.0:
            _, front_doors = self._look()
            if all(door.drained for door in front_doors):
                return
            num_open = sum(door.open_requests for door in front_doors)
            # Before that the counts may be from before the drain.
            if num_open and num_open != told and time.monotonic() - began_s > _REPORTS_EVERY_S:
                told = num_open
                self._announcer.line(f"finishing {num_open} open requests; Ctrl-C again stops at once")
            time.sleep(_LOOK_EVERY_S)

    def take_down(self) -> None:
        """On a Ray that is not ours: the application, the ranks and the roster go. Ours goes as a whole."""
        if not self._joined or self._roster is None:
            return
        import ray
        from ray import serve

        from cluster.app.reap import reap_engine

        names = self._operator.fleet.names if self._operator is not None else engine_names(self._spec.engines)
        apps = {APP, *map(app_name, names)}
        for app in apps:
            serve.delete(app, _blocking=False)
        give_up_s = time.monotonic() + _TAKE_DOWN_S
        while left := apps & serve.status().applications.keys():
            if time.monotonic() > give_up_s:
                log.warning("Serve still takes down %s, and goes on with that", ", ".join(sorted(left)))
                break
            time.sleep(_LOOK_EVERY_S)
        for engine in names:
            reap_engine(engine)
        ray.kill(self._roster)

    @property
    def _joined(self) -> bool:
        """Whether the Ray below is somebody else's, with nodes that we have not seen."""
        return self._session.folder is None

    def _overdue(self, engines: tuple[EngineReport, ...], front_doors: tuple[FrontDoorReport, ...]) -> StartError:
        states = [f"{report.engine} is {report.status.state}" for report in engines] or ["no engine has a leader"]
        states += [f"{len(front_doors)} of {self._spec.front_doors} front doors are there"]
        states += [f"{report.engine}: {report.error}" for report in engines if report.error]
        limit = f"not ready after {self._spec.start_timeout_s:g} s (cluster.start_timeout_s)"
        return StartError(self._with_reasons(f"{limit}: {'; '.join(states)}"), explained=False)

    def _with_reasons(self, message: str) -> str:
        """The message, and below it what the doctor finds wrong with the cluster."""
        found = look_why(self._spec)
        nothing = "`shoal doctor` finds nothing wrong with the nodes; the leader's and the ranks' logs tell more"
        return "\n".join([message, *(map(str, found) if found else (nothing,))])

    def _look(self) -> tuple[tuple[EngineReport, ...], tuple[FrontDoorReport, ...]]:
        import ray

        try:
            engines, front_doors = ray.get(self._roster.overview.remote(), timeout=_ROSTER_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            # Ray starts the roster again; what it knows comes back with the next reports.
            log.warning("the roster does not answer: %s", str(error).splitlines()[0])
            return (), ()
        self._announcer.engines(engines)
        return engines, front_doors

    def _raise_problems(self, engines: tuple[EngineReport, ...], front_doors: tuple[FrontDoorReport, ...]) -> None:
        for report in engines:
            if report.status.state == EngineState.FAILED:
                message = report.error if report.refused or not self._joined else self._with_reasons(report.error)
                raise StartError(message, explained=report.refused)
        for door in front_doors:
            if door.error:
                raise StartError(door.error, explained=True)

    def _all_ready(self, engines: tuple[EngineReport, ...], front_doors: tuple[FrontDoorReport, ...]) -> bool:
        spec = self._spec
        engines_ready = sum(report.status.state == EngineState.READY for report in engines) == spec.engines
        num_groups = spec.engines * spec.settings.plan.data
        doors_ready = sum(door.ready and len(door.dp_groups) == num_groups for door in front_doors) == spec.front_doors
        return engines_ready and doors_ready
