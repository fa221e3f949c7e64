"""The `FrontDoor` deployment: a front door server, the roster's news for it, and its own for the roster."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve

from cluster import logs, telemetry
from cluster.app.faults import inject
from cluster.app.orders import carry_out
from cluster.app.spec import ClusterSpec
from cluster.app.status import status_response
from cluster.front_door.link import Link
from cluster.front_door.server import FrontDoorServer, FrontDoorSettings
from cluster.roster import Decisions, FrontDoorReport, GroupTraffic, Snapshot
from cluster.roster_actor import find_roster
from protos.shoal.v1 import admin_pb2

__all__ = ["FrontDoor", "front_door_deployment"]

log = logging.getLogger(__name__)

_WATCH_S = 1.0
_ACQUAINT_S = 10.0


class FrontDoor:
    """One replica. Serve places it, watches it and starts it again; no request of a client comes through Serve."""

    async def __init__(self, spec: ClusterSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(spec.log_level)
        self._spec = spec
        self._id = serve.get_replica_context().replica_id.unique_id
        self._node = spec.rank_host or ray.util.get_node_ip_address()
        telemetry.export_traces(spec.otlp_endpoint, "shoal-front-door", {"service.instance.id": self._id})
        self._roster = find_roster()
        self._error = ""
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._drained: asyncio.Task[None] | None = None
        self._decisions = Decisions()
        self._closed = False  # because its node was drained
        self._server = FrontDoorServer.from_folder(
            FrontDoorSettings(
                front_door_id=self._id,
                secret=spec.secret,
                host=spec.host,
                grpc_port=spec.grpc_port,
                http_port=spec.http_port,
                api_keys=spec.api_keys,
                administrators=spec.administrators,
                chaos=spec.chaos,
                quotas=spec.quotas,
                tls=spec.tls,
                cors_origins=spec.cors_origins,
                limits=spec.limits,
                routing=spec.routing,
                share_prefixes=spec.settings.scheduling.share_prefixes,
            ),
            spec.settings.model_path,
            spec.card,
            operations=self,
        )
        await self._acquaint()
        try:
            await self._server.start()
        except OSError as error:
            # Serve would only try again; the roster tells whoever started us.
            self._error = str(error)
        self._following = asyncio.get_running_loop().create_task(self._follow(), name="roster")

    async def check_health(self) -> None:
        """Serve's question. That it is answered shows that the event loop of both doors turns."""
        if self._following.done():
            self._following.result()
            raise RuntimeError("the roster is not followed any more")
        if self._closed and self._node not in dict(self._decisions.closing):
            # A server that has closed its port cannot open it again: Serve starts another in its place.
            raise RuntimeError("the node takes requests again, and this front door has left")

    async def status(self) -> admin_pb2.StatusResponse:
        """What `shoal status` shows."""
        ours = self._report()
        try:
            await self._roster.report_front_door.remote(ours)
            engines, front_doors = await self._roster.overview.remote()
        except ray.exceptions.RayError:
            answer = status_response(self._spec, (), (ours,), self._server.links.links, self._decisions)
            answer.warnings.append("the roster does not answer: engines and other front doors are not known")
            return answer
        return status_response(self._spec, engines, front_doors, self._server.links.links, self._decisions)

    def drain(self, request: admin_pb2.DrainRequest) -> AsyncIterator[admin_pb2.OperationEvent]:
        return carry_out(self._roster, "drain", request)

    def scale(self, request: admin_pb2.ScaleRequest) -> AsyncIterator[admin_pb2.OperationEvent]:
        return carry_out(self._roster, "scale", request)

    def rollout(self, request: admin_pb2.RolloutRequest) -> AsyncIterator[admin_pb2.OperationEvent]:
        return carry_out(self._roster, "rollout", request)

    async def inject(self, request: admin_pb2.InjectRequest) -> admin_pb2.InjectResponse:
        """For `shoal chaos`."""
        engines, front_doors = await self._roster.overview.remote()
        log.warning("an administrator asks for %s of %s", request.fault, request.target)
        return await inject(request, engines, front_doors)

    async def __del__(self) -> None:
        """Serve's farewell: open calls are finished first."""
        self._following.cancel()
        await self._drain(self._spec.drain_timeout_s)
        await self._server.stop()
        await self._roster.remove_front_door.remote(self._id)

    async def _acquaint(self) -> None:
        """Where DP groups serve, the ports open when this front door can reach one: the node's other front doors share
        them, and the kernel would give every second new client to the one that knows nobody."""
        try:
            snapshot = await self._roster.watch.remote(-1, _WATCH_S)
        except ray.exceptions.RayError as error:
            log.warning("the roster does not answer: %s", str(error).splitlines()[0])
            return
        self._act_on(snapshot)
        if snapshot.groups and not await self._server.reach_groups(_ACQUAINT_S):
            log.warning("no DP group could be reached in %g s; the doors open all the same", _ACQUAINT_S)

    async def _follow(self) -> None:
        version = -1
        while True:
            try:
                await self._roster.report_front_door.remote(self._report())
                snapshot = await self._roster.watch.remote(version, _WATCH_S)
                engines, _ = await self._roster.overview.remote()
                statuses = [engine.status for engine in engines]
                self._server.engines.see(statuses)
                self._server.experts.see(statuses)
            except ray.exceptions.RayError as error:
                # Ray starts it again; until then the groups that are known stay in use.
                log.warning("the roster does not answer: %s", str(error).splitlines()[0])
                await asyncio.sleep(_WATCH_S)
                continue
            if snapshot.version != version:
                version = snapshot.version
                self._act_on(snapshot)
                self._leave_if_told(snapshot.decisions)

    def _act_on(self, snapshot: Snapshot) -> None:
        links, loop = self._server.links, asyncio.get_running_loop()
        decisions = self._decisions = snapshot.decisions
        links.set_weights(dict(decisions.weights))
        self._server.set_groups(snapshot.groups, snapshot.lost)
        for key, timeout_s in decisions.leaving:
            if key not in self._leaving:
                self._leaving[key] = loop.call_later(timeout_s, links.hand_over, key)
        for key in self._leaving.keys() - dict(decisions.leaving):
            self._leaving.pop(key).cancel()

    def _leave_if_told(self, decisions: Decisions) -> None:
        closing_s = dict(decisions.closing).get(self._node)
        if self._drained is not None or (closing_s is None and not decisions.draining):
            return
        self._closed = closing_s is not None
        timeout_s = self._spec.drain_timeout_s if closing_s is None else closing_s
        self._drained = asyncio.get_running_loop().create_task(self._drain(timeout_s), name="drain")

    async def _drain(self, timeout_s: float) -> None:
        await self._server.drain(timeout_s)
        await asyncio.to_thread(telemetry.flush)

    def _report(self) -> FrontDoorReport:
        links = self._server.links.links
        return FrontDoorReport(
            id=self._id,
            node=self._node,
            pid=os.getpid(),
            open_requests=self._server.num_open,
            ready=self._server.ready(),
            draining=self._drained is not None,
            drained=self._drained is not None and self._drained.done(),
            error=self._error,
            dp_groups=tuple(key for key, link in links.items() if link.ready),
            traffic=tuple(map(_traffic, self._server.links.every)),
        )


def _traffic(link: Link) -> GroupTraffic:
    return GroupTraffic(
        key=link.address.key,
        engine=link.address.engine,
        version=link.address.version,
        num_open=link.num_open,
        num_running=link.load.num_running,
        num_waiting=link.load.num_waiting,
        num_free_blocks=link.load.num_free_blocks,
        num_blocks=link.load.num_blocks,
        num_begun=link.counts.num_begun,
        num_failed=link.counts.num_failed,
        num_first_tokens=link.counts.num_first_tokens,
        first_tokens_s=link.counts.first_tokens_s,
    )


def front_door_deployment(spec: ClusterSpec) -> Any:
    """The deployment, to be bound. Nodes have equally many front doors: whichever is lost, others have one."""
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    return serve.deployment(
        FrontDoor,
        name="FrontDoor",
        num_replicas=spec.front_doors,
        max_replicas_per_node=math.ceil(spec.front_doors / num_nodes) if num_nodes > 1 else None,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=spec.drain_timeout_s + 5.0,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
