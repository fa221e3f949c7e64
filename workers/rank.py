"""One rank: a worker process as its leader sees it.

    open -> join -> load -> start -> (probe, status, renew ...) -> drain -> stop

When a generation is over, because members were lost or others come in, what the rank holds goes on into the next one:

    interrupt -> regroup -> start

A rank that comes in later joins the others of its own DP group alone, loads while the engine serves, and is regrouped
with them.

The methods are synchronous and may be called from several threads: `load_progress`, `status`, `renew` and `probe`
answer while another call works. ValueError means that the settings cannot work here, however often they are tried;
everything else is a failure that a new attempt may cure.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from scheduler.experts import ExpertPlacement
from workers.assemble import assemble
from workers.execution import Follower
from workers.leading import Leading
from workers.lease import Lease
from workers.loop import STOPPED, Broken
from workers.parallel.collectives import CurrentCollectives
from workers.parallel.reach import out_of_reach
from workers.parallel.stages import CurrentStages
from workers.parallel.vacant import AwaitedExchange
from workers.pipeline import LastStage
from workers.relocation import Relocation
from workers.report import ExpertLoads, Holdings, LoadReport, Outdated, RankAddress, RankState, RankStatus
from workers.routing_log import RoutingLog
from workers.runner import Runner
from workers.settings import EngineSettings
from workers.standing import Standing
from workers.threads import in_passing_thread

__all__ = [
    "Broken",
    "ExpertLoads",
    "Holdings",
    "LoadReport",
    "Outdated",
    "Rank",
    "RankAddress",
    "RankState",
    "RankStatus",
]

log = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 60.0
# Between generations everybody waits: who has not come by then is not counted on.
_REGROUP_TIMEOUT_S = 3.0
_STOP_TIMEOUT_S = 5.0
# Python hands the interpreter from thread to thread this often: the step loop must not wait 5 ms, the default, for
# the session server after every operation that releases it.
_SWITCH_INTERVAL_S = 0.0005


def _leave() -> None:
    os._exit(0)


class Rank:
    """`on_start` runs first of all in `open`: the place to install telemetry. `on_lapse` ends the process."""

    def __init__(
        self,
        rank: int,
        settings: EngineSettings,
        secret: bytes,
        *,
        on_start: Callable[[], None] | None = None,
        on_lapse: Callable[[], None] = _leave,
    ) -> None:
        self.rank = rank
        self.settings = settings
        self.place = settings.plan.place(rank)
        self._secret = secret
        self._on_start = on_start
        self._lease = Lease(on_lapse)
        self._state = RankState.NEW
        self._host = ""
        self._changing = threading.Lock()  # held by whoever leaves or joins a generation
        self._progress = (0, 0)
        self._standing = Standing(rank, settings, secret)
        self._tensor: CurrentCollectives | None = None
        self._stages: CurrentStages | None = None
        self._runner: Runner | None = None
        self._leading: Leading | None = None  # at the first rank of a group
        self._follower: Follower | None = None  # at the others
        self._routing_log: RoutingLog | None = None

    def open(self, host: str) -> RankAddress:
        """Prepares the process, which others reach at the address `host`."""
        if self._on_start is not None:
            self._on_start()
        torch.set_num_threads(self.settings.num_threads)
        if torch.get_num_interop_threads() != 1:
            torch.set_num_interop_threads(1)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._host = host
        self._standing.open(host)
        self._state = RankState.OPEN
        return RankAddress(self.rank, host, self._standing.port, os.getpid())

    def join(self, generation: int, store_host: str, store_port: int, addresses: Sequence[RankAddress]) -> None:
        """Meets these ranks: the engine's, or, to come in later, those of this one's DP group.

        `addresses` are in order of rank; all must be called together.
        """
        alone = len(addresses) < self.settings.plan.num_ranks
        with self._changing:
            self._standing.meet(generation, (store_host, store_port), addresses, alone=alone, timeout_s=_JOIN_TIMEOUT_S)
            self._state = RankState.JOINED

    def load(self, progress: Callable[[int, int], None] | None = None) -> LoadReport:
        """Reads the weights and makes the cache; all ranks of a DP group must be called together."""
        standing, membership = self._standing, self._standing.membership
        assert membership is not None, "load before join"
        self._state = RankState.LOADING

        def note(done: int, total: int) -> None:
            self._progress = (done, total)
            if progress is not None:
                progress(done, total)

        groups = membership.groups
        expert = groups.expert
        if expert is None and standing.spread_experts:
            expert = AwaitedExchange(self.place.expert_index, self.settings.plan.expert)
        tensor, stages = groups.tensor, groups.stages
        if standing.regroups:
            tensor = self._tensor = CurrentCollectives(tensor)
            stages = self._stages = CurrentStages(stages)
        self._runner = in_passing_thread(
            lambda: assemble(self.settings, self.place, tensor, stages=stages, expert=expert, progress=note),
            "load",
            niceness=self.settings.load_niceness,
        )
        self._state = RankState.LOADED
        report = self._runner.report
        log.info("rank %d: loaded in %.1f s, %d blocks", self.rank, report.load_s, report.num_blocks)
        return LoadReport(
            load_s=report.load_s,
            bytes_read=report.bytes_read,
            weight_bytes=report.weight_bytes,
            cache_bytes=report.cache_bytes,
            num_blocks=report.num_blocks,
        )

    def load_progress(self) -> tuple[int, int]:
        """Bytes read, and bytes to read in all; zeros before it is known."""
        return self._progress

    def start(self) -> str | None:
        """Runs steps from now on; the address of the session server at the first rank of a DP group."""
        runner = self._runner
        assert runner is not None, "start before load"
        if self._leading is not None or self._follower is not None:
            return self._go_on(runner)
        self._standing.recover()  # from the generation in which this rank was alone while it loaded
        if self.place.tensor_index == 0 and self.settings.record_routing is not None:
            self.record_routing(self.settings.record_routing)
        if self.place.first_in_group:
            self._leading = Leading(
                self.rank,
                self.settings,
                self._secret,
                self._standing,
                runner,
                on_broken=self._stopped,
                on_interrupted=self._stopped,
            )
            self._leading.start(self._host)
        else:
            self._follow(runner)
        self._standing.watch(self._peer_gone, self._peer_hangs)
        # What is alive now lives long: the collector need not walk through it between steps.
        gc.collect()
        gc.freeze()
        self._state = RankState.RUNNING
        return self._session_address or None

    def trouble(self, generation: int, timeout_s: float) -> str:
        """Waits until this rank can run no step of `generation` any more, and says why; empty after `timeout_s`."""
        return self._standing.wait_for_trouble(generation, timeout_s)

    def interrupt(self, generation: int, timeout_s: float) -> Holdings:
        """Ends the generation in force, for `generation` to follow: the step in progress ends or fails, none begins,
        and the groups are left. Sequences, cache and experts stay. What experts these are.

        Raises Outdated where a later leader has been here, TimeoutError where the step does not end in time.
        """
        standing = self._standing
        standing.hear(generation)
        if self._leading is not None:
            self._leading.announce(generation)
        with self._changing:
            if not standing.regroups:
                return Holdings()  # groups that share no steps are not concerned
            standing.note_trouble(f"generation {generation} follows")
            standing.turn_away()
            self._leave(timeout_s)
            if self._state is RankState.RUNNING:
                self._state = RankState.INTERRUPTED
            return self._experts.holdings() if self._experts is not None else Holdings()

    def out_of_reach(self, addresses: Sequence[RankAddress], timeout_s: float) -> list[int]:
        """Those of the ranks to which no connection can be made in time."""
        return out_of_reach([address for address in addresses if address.rank != self.rank], timeout_s)

    def regroup(
        self,
        generation: int,
        store_host: str,
        store_port: int,
        addresses: Sequence[RankAddress],
        epoch: int,
        placements: Sequence[tuple[int, Sequence[Sequence[int]]]],
    ) -> int:
        """Meets the members of the next generation, between `interrupt` and `start`; bytes of experts it had to read.

        `placements` names the experts of every member of this rank's stage, in order of rank, for all of its layers
        that have any. Raises ValueError where memory does not suffice for this rank's.
        """
        standing = self._standing
        with self._changing:
            standing.expect(generation)
            if not standing.regroups:
                standing.generation = generation
                return 0
            assert self._experts is not None, "regroup before load"
            self._leave(_STOP_TIMEOUT_S)
            groups = standing.meet(
                generation, (store_host, store_port), addresses, alone=False, timeout_s=_REGROUP_TIMEOUT_S
            ).groups
            exchange, experts = groups.expert, self._experts
            assert exchange is not None
            assert self._tensor is not None
            assert self._stages is not None
            self._tensor.follow(groups.tensor)
            self._stages.follow(groups.stages)
            places = {layer: _placement(slots) for layer, slots in placements}
            return in_passing_thread(lambda: experts.regroup(epoch, exchange, places), "regroup-experts")

    def probe(self, timeout_s: float) -> float:
        """Seconds that a real token took through every rank of this first rank's group.

        Raises Broken where the group has failed, TimeoutError where no token comes.
        """
        assert self._leading is not None, "probe before start, or not at the first rank of a group"
        return self._leading.probe(timeout_s)

    def status(self) -> RankStatus:
        settings, standing, membership = self.settings, self._standing, self._standing.membership
        report = self._runner.report if self._runner is not None else None
        reason = self._reason()
        kind = membership.groups.kind if membership is not None else ""
        experts = self._experts.loads() if self._experts is not None else None
        return RankStatus(
            rank=self.rank,
            dp_group=self.place.dp_group,
            state=self._state_now(reason),
            reason=reason or standing.trouble,
            host=self._host,
            pid=os.getpid(),
            generation=standing.generation,
            newest_generation=standing.newest,
            device=report.device if report else settings.device,
            dtype=settings.dtype,
            threads=settings.num_threads,
            weight_bytes=report.weight_bytes if report else 0,
            cache_bytes=report.cache_bytes if report else 0,
            num_blocks=report.num_blocks if report else 0,
            block_size=settings.block_size,
            load_s=report.load_s if report else 0.0,
            collectives=kind,
            dispatch=report.dispatch if report else "",
            kernels=report.kernels if report else "",
            session=self._session_address,
            plan_port=standing.port,
            load=self._leading.load if self._leading is not None else None,
            expert_epoch=experts.epoch if experts else 0,
            expert_tokens=sum(map(sum, experts.counts)) if experts else 0,
            warnings=(f"rank {self.rank}: collectives over {kind}",) if kind.startswith("gloo (") else (),
        )

    def _state_now(self, reason: str | None) -> RankState:
        if self._state not in (RankState.RUNNING, RankState.INTERRUPTED):
            return self._state
        if reason:
            return RankState.BROKEN
        return RankState.INTERRUPTED if self._standing.troubled else self._state

    def renew(self, lease_s: float) -> None:
        """Keeps the process alive for `lease_s` from now; without a first call it lives on."""
        self._lease.renew(lease_s)
        if self._changing.acquire(blocking=False):
            try:
                self._standing.turn_away()
            finally:
                self._changing.release()

    def expert_loads(self) -> ExpertLoads | None:
        """What the group's tokens chose; None where the model has no experts that DP groups share."""
        return self._experts.loads() if self._experts is not None else None

    def stage_experts(self, epoch: int, placements: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> int:
        """Reads what this rank lacks of a new placement, while it serves; bytes taken.

        `placements` names layers and, for each, the experts of every rank of the stage. Once all ranks have done so,
        `switch_experts` of the same epoch brings it into force.
        """
        if self._experts is None:
            raise ValueError("experts move between DP groups only, and this engine shares none")
        experts, places = self._experts, {layer: _placement(slots) for layer, slots in placements}
        return in_passing_thread(lambda: experts.stage(epoch, places), "stage-experts")

    def switch_experts(self, epoch: int, timeout_s: float) -> None:
        """To be called on all ranks, once all have staged the epoch: they switch before the same step.

        Comes back when this rank has. Raises TimeoutError where the others are not ready in time.
        """
        if self._experts is None:
            raise ValueError("experts move between DP groups only, and this engine shares none")
        pulse = self._standing.pulse
        if pulse is not None and self._experts.epoch < epoch:
            self._experts.check(epoch)
            pulse.offer(epoch)
        self._experts.wait(epoch, timeout_s)

    def record_routing(self, folder: str | None) -> None:
        """Writes what the group's tokens choose in this rank's layers from now on into `folder` of this machine; None
        ends that."""
        runner = self._runner
        assert runner is not None, "record_routing before load"
        log, self._routing_log = self._routing_log, None
        runner.record_routing(None)
        if log is not None:
            log.close()
        if folder is None:
            return
        config = runner.model_config
        if config.moe is None:
            raise ValueError(f"a {config.model_type} model has no routed experts to record")
        if not runner.expert_layers:
            return  # a stage of a pipeline that has none of them
        self._routing_log = RoutingLog(
            Path(folder),
            f"{self.settings.engine}-rank-{self.rank}",
            generation=self._standing.generation,
            layers=runner.expert_layers,
            num_experts=config.moe.gate.num_experts,
        )
        runner.record_routing(self._routing_log)

    def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what is open; False where that takes longer."""
        drained = self._leading.drain(timeout_s) if self._leading is not None else True
        if self._routing_log is not None:
            self.record_routing(None)  # the process may be killed next, and nothing follows that were worth recording
        return drained

    def stop(self) -> None:
        """Ends every thread and connection; what is open ends as FAILED. Safe to repeat."""
        self._lease.end()
        if self._experts is not None:
            self._experts.end()
        if self._leading is not None:
            self._leading.end_steps(_STOP_TIMEOUT_S)
        if self._routing_log is not None:
            self.record_routing(None)
        if self._leading is not None:
            self._leading.close()
        if self._follower is not None:
            self._follower.stop(_STOP_TIMEOUT_S)
        self._standing.close()
        self._state = RankState.STOPPED

    @property
    def _experts(self) -> Relocation | None:
        return self._runner.experts if self._runner is not None else None

    @property
    def _session_address(self) -> str:
        return self._leading.address if self._leading is not None else ""

    def _follow(self, runner: Runner) -> None:
        membership = self._standing.membership
        assert membership is not None, "follow before join"
        assert membership.receiver is not None
        self._follower = Follower(
            runner,
            membership.receiver,
            rank=self.rank,
            experts=runner.experts,
            answer=LastStage(membership.answers) if membership.answers is not None else None,
            on_broken=self._standing.note_trouble,
        )
        self._follower.start()

    def _go_on(self, runner: Runner) -> str | None:
        """Steps of the generation that was joined since."""
        standing = self._standing
        if standing.regroups:
            assert standing.membership is not None, "start before regroup"
            standing.recover()
            if self._leading is not None:
                self._leading.resume(standing.membership)
            else:
                self._follow(runner)
            standing.watch(self._peer_gone, self._peer_hangs)
            self._state = RankState.RUNNING
        elif self._leading is not None:
            self._leading.renumber()
        return self._session_address or None

    def _leave(self, timeout_s: float) -> None:
        """Leaves the groups with all steps at rest."""
        standing = self._standing
        standing.end_watch()
        if self._leading is not None:
            self._leading.interrupt(standing.trouble)
        self._hang_up()
        if self._leading is not None and not self._leading.rest(timeout_s):
            raise TimeoutError(f"rank {self.rank}: a step did not end in {timeout_s:g} s")
        if self._follower is not None and not self._follower.stop(timeout_s):
            raise TimeoutError(f"rank {self.rank}: a step did not end in {timeout_s:g} s")
        if self._tensor is not None:
            self._tensor.leave()
        if self._stages is not None:
            self._stages.leave()
        standing.leave()

    def _stopped(self, reason: str) -> None:
        """From the step loop, which rests or is broken: others must not wait for this rank, and the leader hears of
        it."""
        self._hang_up()
        self._standing.note_trouble(reason)

    def _hang_up(self) -> None:
        self._standing.hang_up()
        if self._experts is not None:
            self._experts.end()

    def _peer_gone(self, reason: str) -> None:
        """A follower's own thread sees that its channel has ended."""
        if self._leading is not None:
            self._leading.peer_gone(reason)

    def _peer_hangs(self, reason: str) -> None:
        if self._leading is not None:
            self._leading.peer_gone(reason)
        elif self._follower is not None:
            self._follower.fail(reason)

    def _reason(self) -> str | None:
        """Why no step will ever run again. A follower whose group may be regrouped waits for that."""
        reason = None
        if self._leading is not None:
            reason = self._leading.reason
        elif self._follower is not None and not self._standing.regroups:
            reason = self._follower.reason
        return None if reason == STOPPED else reason


def _placement(slots: Sequence[Sequence[int]]) -> ExpertPlacement:
    return ExpertPlacement(max(map(max, slots)) + 1, tuple(map(tuple, slots)))
