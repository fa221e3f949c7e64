"""An engine's ranks as named, detached Ray actors in one named, detached placement group."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.app.names import NAMESPACE, placement_name, rank_name
from cluster.app.reap import placement_groups_of, rank_names_of, reap_engine
from cluster.app.spec import ClusterSpec
from cluster.engine.bundles import Bundles, bundle_ranks, bundles_of
from cluster.engine.fencing import kill_process
from cluster.engine.rank_actor import RankActor
from cluster.engine.ranks import BESIDE_NICENESS, ExpertPlaces, Rank, RankLost, RankRefused, Superseded
from workers.report import ExpertLoads, Holdings, Outdated, RankAddress, RankStatus

__all__ = ["RayRanks"]

log = logging.getLogger(__name__)

# probe, status, renew, drain and load_progress beside a call that takes long; `outlive` and `trouble`, for this leader
# and for some before it
_CONCURRENCY = 16
_WAIT_S = 30.0  # of the calls that wait for something to happen, which are then made again
_PLACE_NOTE_S = 10.0
_GONE_EVERY_S = 0.05
_GONE_TIMEOUT_S = 30.0
_FENCE_S = 0.5  # what is within reach has ended by then; for the rest nobody waits


class RayRanks:
    """The ranks of `engine`; see `cluster.engine.ranks.Ranks`."""

    def __init__(self, engine: str, spec: ClusterSpec) -> None:
        self._engine = engine
        self._spec = spec
        self._settings = replace(spec.settings, engine=engine)
        self._actors: dict[int, Any] = {}

    async def adopt(self) -> dict[int, Rank]:
        names = set(await asyncio.to_thread(rank_names_of, self._engine))
        found: dict[int, Rank] = {}
        for rank in range(self._settings.plan.num_ranks):
            name = rank_name(self._engine, rank)
            if name in names:
                with contextlib.suppress(ValueError):  # it ended in between
                    found[rank] = self._known(rank, ray.get_actor(name, namespace=NAMESPACE))
        return found

    async def place(self) -> dict[int, Rank]:
        plan = self._settings.plan
        bundles = bundle_ranks(self._settings, _largest_node("GPU" if self._settings.device == "cuda" else "CPU"))
        if bundles.ranks < plan.tensor:
            log.warning("%s: no node has room for %d tensor-parallel ranks: they are spread", self._engine, plan.tensor)
        group = placement_group(
            [bundles.bundle] * bundles.count, strategy="PACK", name=placement_name(self._engine), lifetime="detached"
        )
        await self._wait_for(group, bundles)
        return {rank: self._start(rank, group, bundles) for rank in range(plan.num_ranks)}

    async def replace(self, numbers: Sequence[int]) -> dict[int, Rank]:
        names = {rank_name(self._engine, number) for number in numbers}
        try:
            await asyncio.to_thread(self._end, names)
            groups = await asyncio.to_thread(placement_groups_of, self._engine)
        except RayError as error:
            raise RankLost(f"Ray's head does not answer: {_first_line(error)}") from None
        if not groups:
            raise RankLost("the ranks' placement group is gone")
        self._settings = replace(self._settings, load_niceness=BESIDE_NICENESS)
        bundles = bundles_of(self._settings, groups[0].bundle_count)
        return {number: self._start(number, groups[0], bundles) for number in numbers}

    async def fence(self, number: int, address: RankAddress | None) -> None:
        """Does not wait for a head that is away: there it is done when that is back, to this process and no later one
        of its name."""
        actor = self._actors.pop(number, None)
        done = asyncio.Event()
        fencing = partial(_fence, actor, address, partial(asyncio.get_running_loop().call_soon_threadsafe, done.set))
        threading.Thread(target=fencing, name=f"fence rank {number}", daemon=True).start()
        try:
            async with asyncio.timeout(_FENCE_S):
                await done.wait()
        except TimeoutError:
            log.warning("%s: Ray has not ended rank %d in %g s; going on without it", self._engine, number, _FENCE_S)

    def _end(self, names: set[str]) -> None:
        """Ends ranks by their names, and waits until these can be given anew."""
        give_up_s = time.monotonic() + _GONE_TIMEOUT_S
        while left := names & set(rank_names_of(self._engine)):
            for name in left:
                with contextlib.suppress(ValueError):  # it ended in between
                    ray.kill(ray.get_actor(name, namespace=NAMESPACE))
            if time.monotonic() > give_up_s:
                raise RankLost(f"Ray did not end {sorted(left)} in {_GONE_TIMEOUT_S:g} s")
            time.sleep(_GONE_EVERY_S)

    async def clear(self) -> None:
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        """Ray ends processes in its own time: wait for it, because their names and memory are wanted again."""
        reap_engine(self._engine)
        give_up_s = time.monotonic() + _GONE_TIMEOUT_S
        while self._remains():
            if time.monotonic() > give_up_s:
                raise TimeoutError(f"{self._engine}: Ray did not end the ranks in {_GONE_TIMEOUT_S:g} s")
            time.sleep(_GONE_EVERY_S)

    def _remains(self) -> bool:
        return bool(rank_names_of(self._engine) or placement_groups_of(self._engine))

    async def _wait_for(self, group: PlacementGroup, bundles: Bundles) -> None:
        """For as long as it takes: a node may be on its way."""
        ready = asyncio.ensure_future(group.ready())
        while not (await asyncio.wait({ready}, timeout=_PLACE_NOTE_S))[0]:
            log.warning("%s waits for a cluster with room for %s", self._engine, bundles)
        try:
            ready.result()
        except RayError as error:
            raise RankLost(f"no place for the ranks: {_first_line(error)}") from None

    def _start(self, rank: int, group: PlacementGroup, bundles: Bundles) -> Rank:
        options = {
            "name": rank_name(self._engine, rank),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "max_concurrency": _CONCURRENCY,
            "num_cpus": bundles.each if bundles.resource == "CPU" else 0,
            "num_gpus": bundles.each if bundles.resource == "GPU" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundles.index(rank)
            ),
        }
        try:
            return self._known(rank, ray.remote(RankActor).options(**options).remote(rank, self._settings, self._spec))
        except RayError as error:  # such as a name that Ray's head still takes for that of a living one
            raise RankLost(f"rank {rank} does not start: {_first_line(error)}") from None

    def _known(self, rank: int, actor: Any) -> Rank:
        self._actors[rank] = actor
        return _RayRank(rank, actor)


def _fence(actor: Any, address: RankAddress | None, done: Callable[[], object]) -> None:
    """A frozen process does not hear of Ray's order, so it is killed by its id, too; first, where that is here."""
    try:
        if address is not None:
            kill_process(address.host, address.pid)
        if actor is not None:
            ray.kill(actor)
    except (RayError, ValueError) as error:
        log.warning("a lost rank may still run: %s", _first_line(error))
    finally:
        with contextlib.suppress(RuntimeError):  # of a loop that has ended
            done()


class _RayRank:
    """Ray's errors in our words."""

    def __init__(self, rank: int, actor: Any) -> None:
        self._rank = rank
        self._actor = actor

    async def open(self) -> RankAddress:
        return await self._ask(self._actor.open.remote())  # type: ignore[no-any-return]

    async def join(self, generation: int, store: tuple[str, int], addresses: Sequence[RankAddress]) -> None:
        await self._ask(self._actor.join.remote(generation, store, addresses))

    async def load(self) -> None:
        await self._ask(self._actor.load.remote())

    async def load_progress(self) -> tuple[int, int]:
        return await self._ask(self._actor.load_progress.remote())  # type: ignore[no-any-return]

    async def start(self) -> str | None:
        return await self._ask(self._actor.start.remote())  # type: ignore[no-any-return]

    async def trouble(self, generation: int) -> str:
        reason = ""
        while not reason:
            reason = await self._ask(self._actor.trouble.remote(generation, _WAIT_S))
        return reason

    async def interrupt(self, generation: int, timeout_s: float) -> Holdings:
        return await self._ask(self._actor.interrupt.remote(generation, timeout_s))  # type: ignore[no-any-return]

    async def out_of_reach(self, addresses: Sequence[RankAddress], timeout_s: float) -> list[int]:
        return await self._ask(self._actor.out_of_reach.remote(addresses, timeout_s))  # type: ignore[no-any-return]

    async def regroup(
        self,
        generation: int,
        store: tuple[str, int],
        addresses: Sequence[RankAddress],
        epoch: int,
        placements: Sequence[ExpertPlaces],
    ) -> int:
        answer = self._actor.regroup.remote(generation, store, addresses, epoch, placements)
        return await self._ask(answer)  # type: ignore[no-any-return]

    async def probe(self, timeout_s: float) -> float:
        return await self._ask(self._actor.probe.remote(timeout_s))  # type: ignore[no-any-return]

    async def status(self) -> RankStatus:
        return await self._ask(self._actor.status.remote())  # type: ignore[no-any-return]

    async def expert_loads(self) -> ExpertLoads | None:
        return await self._ask(self._actor.expert_loads.remote())  # type: ignore[no-any-return]

    async def stage_experts(self, epoch: int, placements: Sequence[ExpertPlaces]) -> None:
        await self._ask(self._actor.stage_experts.remote(epoch, placements))

    async def switch_experts(self, epoch: int, timeout_s: float) -> None:
        await self._ask(self._actor.switch_experts.remote(epoch, timeout_s))

    async def renew(self, lease_s: float) -> None:
        await self._ask(self._actor.renew.remote(lease_s))

    async def drain(self, timeout_s: float) -> bool:
        return await self._ask(self._actor.drain.remote(timeout_s))  # type: ignore[no-any-return]

    async def lost(self) -> None:
        while True:
            await self._ask(self._actor.outlive.remote(_WAIT_S))

    async def _ask(self, answer: Any) -> Any:
        try:
            return await answer
        except RayActorError as error:
            raise RankLost(f"rank {self._rank} died: {_death(error)}") from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Outdated):
                raise Superseded(str(cause)) from None
            if isinstance(cause, ValueError | MemoryError):
                raise RankRefused(_first_line(cause)) from None
            log.warning("rank %d failed: %s", self._rank, error)
            raise RankLost(f"rank {self._rank}: {_first_line(cause or error)}") from None
        except RayError as error:
            raise RankLost(f"rank {self._rank} cannot be reached: {_first_line(error)}") from None


def _largest_node(resource: str) -> float:
    return max((node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def _death(error: RayActorError) -> str:
    # What Ray says of every death names the kernel's OOM killer as a possible cause; this, only its own memory monitor.
    if "running low on memory" in str(error):
        return "the machine ran out of memory"
    return "its process is gone"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
