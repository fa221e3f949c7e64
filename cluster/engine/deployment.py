"""The `Engine` deployment: a replica is one engine's leader."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import serve

from cluster import logs
from cluster.app.names import ON_HEAD
from cluster.app.spec import ClusterSpec
from cluster.config.network import rank_address
from cluster.engine.leader import Leader, StoreHost
from cluster.engine.placement import RayRanks
from cluster.engine.states import EngineState
from cluster.roster import Claim, EngineReport
from cluster.roster_actor import find_roster
from workers.threads import in_passing_thread

__all__ = ["Engine", "engine_deployment"]

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
_CLAIM_EVERY_S = 0.5


class Engine:
    """Claims its engine in the roster, leads it, and reports it; a replica that Serve starts anew does the same."""

    async def __init__(self, spec: ClusterSpec, engine: str) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(spec.log_level)
        self._spec = spec
        self._engine = engine
        self._id = serve.get_replica_context().replica_id.unique_id
        self._roster = find_roster()
        self._leader: Leader | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._lead(), name="leader")

    async def check_health(self) -> None:
        """Serve's question: whether this leader leads. A sick engine is its leader's business, not Serve's."""
        if self._task.done():
            self._task.result()
            raise RuntimeError("this replica leads no engine any more")

    async def __del__(self) -> None:
        """Serve's farewell: the engine goes with its leader. (A leader that is killed, or fails, leaves it to the next:
        its ranks may serve, and may have another leader already.)"""
        failed = self._task.done()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if failed:
            return
        if self._leader is not None and self._leader.state is not EngineState.STOPPED:
            await self._leader.drain(self._spec.drain_timeout_s)
            await self._leader.stop()
            await self._roster.release.remote(self._id)

    async def _lead(self) -> None:
        claim = await self._claim()
        settings = replace(self._spec.settings, engine=claim.engine)
        self._leader = Leader(
            settings,
            RayRanks(claim.engine, self._spec),
            self._host_store,
            self._changed.set,
            generation=claim.generation,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._leader.run(), name="run")
            tasks.create_task(self._report(self._leader, claim.engine), name="report")

    def _host_store(self, first_rank_host: str) -> StoreHost:
        """On this leader's node, which need not be the first rank's."""
        spec = self._spec
        # Brings torch, which an engine of one rank does not need here.
        bring = partial(importlib.import_module, "workers.parallel.groups")
        in_passing_thread(bring, "import", niceness=spec.settings.load_niceness)
        from workers.parallel.groups import host_store

        del first_rank_host
        return host_store(spec.rank_host or rank_address(spec.network, ray.util.get_node_ip_address()))

    async def _claim(self) -> Claim:
        while True:
            claim = await self._roster.claim.remote(self._id, (self._engine,))
            if claim is not None:
                return claim  # type: ignore[no-any-return]
            await asyncio.sleep(_CLAIM_EVERY_S)

    async def _report(self, leader: Leader, engine: str) -> None:
        while True:
            self._changed.clear()
            groups = tuple(replace(group, version=self._spec.version) for group in leader.groups())
            report = EngineReport(
                engine=engine,
                leader=self._id,
                version=self._spec.version,
                pid=os.getpid(),
                node=self._spec.rank_host or ray.util.get_node_ip_address(),
                groups=groups if leader.has_looked else None,
                status=leader.status(),
                progress=leader.progress,
                error=leader.error,
                refused=leader.refused,
                lost=leader.lost,
            )
            try:
                if not await self._roster.report_engine.remote(report):
                    raise RuntimeError(f"{engine} has another leader")
            except ray.exceptions.RayError as error:
                # Ray starts it again, and the next report tells it everything.
                log.warning("the roster does not answer: %s", str(error).splitlines()[0])
            try:
                async with asyncio.timeout(_REPORT_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                continue


def engine_deployment(spec: ClusterSpec) -> Any:
    """The deployment of one engine, to be bound to its spec and name."""
    return serve.deployment(
        Engine,
        name="Engine",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=spec.drain_timeout_s + 10.0,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
