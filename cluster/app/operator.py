"""Carries out what administrators order, one after the other, beside a run; and scales where that is left to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.app.nodes import cluster_machine
from cluster.app.prepare import prepare_rollout
from cluster.app.ray_world import RayWorld
from cluster.app.spec import ClusterSpec
from cluster.config.load import ConfigError
from cluster.config.machine import Machine, this_machine
from cluster.models.errors import ModelError
from cluster.operations.autoscale import loads_of
from cluster.operations.drain import drain
from cluster.operations.fleet import Fleet
from cluster.operations.rollout import roll_out
from cluster.operations.scale import scale
from cluster.operations.world import OperationFailed
from cluster.orders import News, Order
from protos.shoal.v1 import admin_pb2
from scheduler.autoscale import Autoscaler

__all__ = ["Operator"]

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_CALL_S = 10.0
_END_S = 10.0


class Operator:
    """A thread; `say` gets every line of news, too."""

    def __init__(self, spec: ClusterSpec, roster: Any, stop: threading.Event, say: Callable[[str], None]) -> None:
        self._roster = roster
        self._stop = stop
        self._say = say
        self._world = RayWorld(roster, stop)
        self.fleet = Fleet(spec, self._world)
        self._autoscaler = Autoscaler(spec.autoscale) if spec.autoscale is not None else None
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """After `stop` was set: what is under way ends at its next wait, unless Ray Serve keeps it longer."""
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            try:
                order = ray.get(self._roster.take_order.remote(), timeout=_CALL_S)
            except RayError as error:
                log.warning("the roster does not answer: %s", str(error).splitlines()[0])
                continue
            if order is not None:
                self._carry_out(order)
            elif self._autoscaler is not None:
                self._autoscale(self._autoscaler)

    def _carry_out(self, order: Order) -> None:
        def tell(line: str) -> None:
            self._tell(order, News("running", line))

        try:
            if order.kind == "drain":
                drain(self.fleet, admin_pb2.DrainRequest.FromString(order.request), tell)
            elif order.kind == "scale":
                scale(self.fleet, admin_pb2.ScaleRequest.FromString(order.request).engines, tell)
            else:
                request = admin_pb2.RolloutRequest.FromString(order.request)
                rollout = prepare_rollout(request, self.fleet.spec, self._machine())
                for reason in rollout.spec.settings.plan_reasons:
                    tell(f"{rollout.spec.settings.plan}: {reason}")
                roll_out(self.fleet, rollout, tell)
        except (OperationFailed, ConfigError, ModelError) as error:
            self._tell(order, News("failed", str(error)))
        except Exception:
            log.exception("order %d failed", order.number)
            self._tell(order, News("failed", "an unexpected error; the log of `shoal serve` has it"))
        else:
            self._tell(order, News("done", f"{order.kind}: done"))

    def _machine(self) -> Machine:
        """With a Ray of our own, ranks listen on loopback: this machine is all there is."""
        return cluster_machine() if self.fleet.spec.rank_host is None else this_machine()

    def _tell(self, order: Order, news: News) -> None:
        self._say(f"{order.kind} {order.number}: {news.line}")
        try:
            self._world.tell_news(order.number, news)
        except OperationFailed as error:
            log.warning("nobody hears how order %d goes: %s", order.number, error)

    def _autoscale(self, autoscaler: Autoscaler) -> None:
        try:
            loads = loads_of(*self._world.overview(), names=self.fleet.names)
            count = autoscaler.wanted(self._world.now_s(), loads)
            if count != len(self.fleet.names):
                self._say(f"autoscale: {len(self.fleet.names)} to {count} engines ({loads})")
                scale(self.fleet, count, lambda line: self._say(f"autoscale: {line}"))
        except OperationFailed as error:
            self._say(f"autoscale: {error}")
