"""An operation's `World` as Ray and Ray Serve have it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.app.names import app_name
from cluster.app.reap import reap_engine
from cluster.app.spec import ClusterSpec
from cluster.engine.deployment import engine_deployment
from cluster.engine.ranks import BESIDE_NICENESS
from cluster.operations.world import OperationFailed
from cluster.orders import News
from cluster.roster import EngineReport, FrontDoorReport

__all__ = ["RayWorld"]

log = logging.getLogger(__name__)

_CALL_S = 15.0
_TRY_S = 30.0  # the roster is started again by Ray, and hears everything anew


class RayWorld:
    """`stop` ends every wait. Calls from one thread."""

    def __init__(self, roster: Any, stop: threading.Event) -> None:
        self._roster = roster
        self._stop = stop

    def overview(self) -> tuple[Sequence[EngineReport], Sequence[FrontDoorReport]]:
        found: tuple[Sequence[EngineReport], Sequence[FrontDoorReport]] = self._ask("overview")
        return found

    def start_engine(self, name: str, spec: ClusterSpec) -> None:
        self._need_room(spec)
        spec = replace(spec, settings=replace(spec.settings, load_niceness=BESIDE_NICENESS))
        app = engine_deployment(spec).bind(spec, name)
        self._have_served(f"start {name}", lambda: serve.run(app, name=app_name(name), route_prefix=None))

    def stop_engine(self, name: str) -> None:
        self._have_served(f"end {name}", lambda: serve.delete(app_name(name)))
        self._have_served(f"end {name}", lambda: reap_engine(name))

    def leave(self, keys: Sequence[str], timeout_s: float) -> None:
        self._ask("leave", tuple(keys), timeout_s)

    def stay(self, keys: Sequence[str]) -> None:
        self._ask("stay", tuple(keys))

    def close_doors(self, node: str, timeout_s: float) -> None:
        self._ask("close_doors", node, timeout_s)

    def open_doors(self, node: str) -> None:
        self._ask("open_doors", node)

    def weigh(self, weights: Sequence[tuple[str, float]]) -> None:
        self._ask("weigh", tuple(weights))

    def tell_news(self, number: int, news: News) -> None:
        """For whoever waits for an order."""
        self._ask("tell_news", number, news)

    def now_s(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise OperationFailed("the cluster is shutting down")

    def _have_served(self, what: str, act: Callable[[], object]) -> None:
        """Once more where Serve's controller died meanwhile: Ray starts it again, and it knows what it knew."""
        give_up_s = time.monotonic() + _TRY_S
        while True:
            try:
                act()
                return
            except (RayError, RayServeException, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                if not isinstance(error, RayError) or time.monotonic() > give_up_s:
                    raise OperationFailed(f"Ray Serve does not {what}: {reason}") from None
                log.warning("Ray Serve does not %s yet: %s", what, reason)
            self.wait(0.5)

    def _ask(self, method: str, *arguments: object) -> Any:
        give_up_s = time.monotonic() + _TRY_S
        while True:
            try:
                return ray.get(getattr(self._roster, method).remote(*arguments), timeout=_CALL_S)
            except RayError as error:
                if time.monotonic() > give_up_s:
                    raise OperationFailed(f"the roster does not answer: {str(error).splitlines()[0]}") from None
            self.wait(0.5)

    def _need_room(self, spec: ClusterSpec) -> None:
        """A Ray of our own has room for a number of engines that was fixed at its start; any other may still grow."""
        if spec.rank_host is None:
            return
        resource = "GPU" if spec.settings.device == "cuda" else "CPU"
        each = 1 if resource == "GPU" else spec.settings.num_threads
        needed = spec.settings.plan.num_ranks * each
        free = ray.available_resources().get(resource, 0.0)
        if needed > free:
            raise OperationFailed(
                f"no room for another engine: it takes {needed} {resource}, {free:g} are left; "
                "start with a larger cluster.max_engines"
            )
