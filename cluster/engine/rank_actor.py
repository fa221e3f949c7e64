"""A rank's process: `workers.rank.Rank` as a Ray actor."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from cluster import logs, telemetry
from cluster.app.spec import ClusterSpec
from cluster.config.environment import set_variables
from cluster.config.network import rank_address, rank_variables
from cluster.engine.ranks import ExpertPlaces
from workers.report import ExpertLoads, Holdings, LoadReport, RankAddress, RankStatus
from workers.settings import EngineSettings
from workers.threads import in_passing_thread

if TYPE_CHECKING:
    from workers.rank import Rank

__all__ = ["RankActor"]


class RankActor:
    """Nothing but what Ray needs: threads to call from, and a call that ends with the process."""

    _rank: Rank

    def __init__(self, rank: int, settings: EngineSettings, spec: ClusterSpec) -> None:
        logs.configure(spec.log_level)
        set_variables({"OMP_NUM_THREADS": str(settings.num_threads), **rank_variables(spec.network)})
        attributes: dict[str, str | int] = {"shoal.engine": settings.engine, "shoal.rank": rank}
        telemetry.export_traces(spec.otlp_endpoint, "shoal-rank", attributes)
        self._arguments = (rank, settings, spec.secret.encode())
        self._spec = spec
        self._for_ever = threading.Event()

    def open(self) -> RankAddress:
        """The first call. What goes wrong here is told; of an actor that fails as it is made Ray may tell nothing.

        torch is imported now and not before: its thread pool takes its size from the environment at that moment.
        """
        settings = self._arguments[1]
        in_passing_thread(lambda: _import(settings), "import", niceness=settings.load_niceness)
        from workers.rank import Rank

        self._rank = Rank(*self._arguments)
        host = self._spec.rank_host or rank_address(self._spec.network, ray.util.get_node_ip_address())
        return self._rank.open(host)

    def join(self, generation: int, store: tuple[str, int], addresses: Sequence[RankAddress]) -> None:
        self._rank.join(generation, *store, addresses)

    def load(self) -> LoadReport:
        return self._rank.load()

    def load_progress(self) -> tuple[int, int]:
        return self._rank.load_progress()

    def start(self) -> str | None:
        return self._rank.start()

    def trouble(self, generation: int, timeout_s: float) -> str:
        return self._rank.trouble(generation, timeout_s)

    def interrupt(self, generation: int, timeout_s: float) -> Holdings:
        return self._rank.interrupt(generation, timeout_s)

    def out_of_reach(self, addresses: Sequence[RankAddress], timeout_s: float) -> list[int]:
        return self._rank.out_of_reach(addresses, timeout_s)

    def regroup(
        self,
        generation: int,
        store: tuple[str, int],
        addresses: Sequence[RankAddress],
        epoch: int,
        placements: Sequence[ExpertPlaces],
    ) -> int:
        return self._rank.regroup(generation, *store, addresses, epoch, placements)

    def probe(self, timeout_s: float) -> float:
        return self._rank.probe(timeout_s)

    def status(self) -> RankStatus:
        return self._rank.status()

    def expert_loads(self) -> ExpertLoads | None:
        return self._rank.expert_loads()

    def stage_experts(self, epoch: int, placements: Sequence[ExpertPlaces]) -> None:
        self._rank.stage_experts(epoch, placements)

    def switch_experts(self, epoch: int, timeout_s: float) -> None:
        self._rank.switch_experts(epoch, timeout_s)

    def renew(self, lease_s: float) -> None:
        self._rank.renew(lease_s)

    def drain(self, timeout_s: float) -> bool:
        return self._rank.drain(timeout_s)

    def stop(self) -> None:
        self._rank.stop()

    def outlive(self, timeout_s: float) -> None:
        """Comes back after that time: who waits for it learns of the process's end at once."""
        self._for_ever.wait(timeout_s)


def _import(settings: EngineSettings) -> None:
    """What takes seconds of computing."""
    importlib.import_module("workers.rank")
    if settings.plan.num_ranks > 1:
        from workers.parallel.groups import import_deepspeed

        import_deepspeed()
