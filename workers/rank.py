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
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from protos.shoal.v1 import session_pb2
from scheduler.batcher import Batcher, BatcherSettings
from scheduler.experts import ExpertPlacement
from workers.assemble import assemble, spreads_experts
from workers.execution import FirstRank, Follower
from workers.group import Membership
from workers.guided import GrammarCompiler
from workers.lease import Lease
from workers.loop import STOPPED, Broken, StepLoop
from workers.parallel.channel import PlanListener
from workers.parallel.collectives import CurrentCollectives
from workers.parallel.pulse import Pulse
from workers.parallel.vacant import AwaitedExchange
from workers.pipeline import FirstStage, LastStage, StageRanks
from workers.pipelined_loop import PipelinedLoop
from workers.records import Records
from workers.relocation import Relocation
from workers.report import ExpertLoads, Holdings, LoadReport, Outdated, RankAddress, RankState, RankStatus
from workers.routing_log import RoutingLog
from workers.runner import Runner
from workers.session import SessionServer
from workers.settings import EngineSettings
from workers.step_log import StepLog
from workers.threads import in_passing_thread
from workers.watch import PeerWatch

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
_NO_TOKENIZER = "the model has no tokenizer.json"
_NO_GRAMMARS = "the model is served with parallel.pipeline above 1, whose last stage knows no grammars"


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
        self._spread_experts = False
        self._regroups = False  # whether a generation may end, and the group go on in the next one
        self._generation = 0
        self._newest = 0  # the highest generation that a leader has named, in force or not
        self._changing = threading.Lock()  # held by whoever leaves or joins a generation
        self._troubled = threading.Event()
        self._trouble = ""
        self._tensor: CurrentCollectives | None = None
        self._progress = (0, 0)
        self._listener: PlanListener | None = None
        self._membership: Membership | None = None
        self._runner: Runner | None = None
        self._execution: FirstRank | FirstStage | None = None
        self._loop: StepLoop | None = None
        self._follower: Follower | None = None
        self._session: SessionServer | None = None
        self._grammars: GrammarCompiler | None = None
        self._session_address = ""
        self._records = Records(time.monotonic, keep_s=settings.resume_window_s)
        self._watch: PeerWatch | None = None
        self._pulse: Pulse | None = None
        self._routing_log: RoutingLog | None = None
        self._step_log: StepLog | None = None

    def open(self, host: str) -> RankAddress:
        """Prepares the process, which others reach at the address `host`."""
        if self._on_start is not None:
            self._on_start()
        torch.set_num_threads(self.settings.num_threads)
        if torch.get_num_interop_threads() != 1:
            torch.set_num_interop_threads(1)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._host = host
        self._spread_experts = spreads_experts(self.settings)
        self._regroups = self._spread_experts and self.settings.plan.pipeline == 1
        if self.place.first_in_group and (self.settings.plan.group_size > 1 or self._spread_experts):
            self._listener = PlanListener(host)
        self._state = RankState.OPEN
        return RankAddress(self.rank, host, self._listener.port if self._listener else 0, os.getpid())

    def join(self, generation: int, store_host: str, store_port: int, addresses: Sequence[RankAddress]) -> None:
        """Meets these ranks: the engine's, or, to come in later, those of this one's DP group.

        `addresses` are in order of rank; all must be called together.
        """
        whole = len(addresses) == self.settings.plan.num_ranks
        with self._changing:
            self._meet(generation, (store_host, store_port), addresses, self._spread_experts and whole, _JOIN_TIMEOUT_S)
            self._state = RankState.JOINED

    def _meet(
        self,
        generation: int,
        store: tuple[str, int],
        addresses: Sequence[RankAddress],
        spread_experts: bool,
        timeout_s: float,
    ) -> Membership:
        self._membership = Membership.join(
            self.settings,
            self.rank,
            generation=generation,
            store=store,
            addresses=addresses,
            listener=self._listener,
            secret=self._secret,
            spread_experts=spread_experts,
            timeout_s=timeout_s,
        )
        self._generation = self._newest = generation
        return self._membership

    def load(self, progress: Callable[[int, int], None] | None = None) -> LoadReport:
        """Reads the weights and makes the cache; all ranks of a DP group must be called together."""
        assert self._membership is not None, "load before join"
        self._state = RankState.LOADING

        def note(done: int, total: int) -> None:
            self._progress = (done, total)
            if progress is not None:
                progress(done, total)

        groups = self._membership.groups
        expert = groups.expert
        if expert is None and self._spread_experts:
            expert = AwaitedExchange(self.place.expert_index, self.settings.plan.expert)
        tensor = groups.tensor
        if self._regroups:
            tensor = self._tensor = CurrentCollectives(tensor)
        self._runner = in_passing_thread(
            lambda: assemble(self.settings, self.place, tensor, stages=groups.stages, expert=expert, progress=note),
            "load",
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
        membership, runner = self._membership, self._runner
        assert membership is not None, "start before join"
        assert runner is not None, "start before load"
        if self._loop is not None or self._follower is not None:
            return self._go_on(membership, runner)
        address = None
        if self.place.first_in_group:
            address = self._lead(membership, runner)
        else:
            self._follow(membership, runner)
        self._watch_peers(membership)
        # What is alive now lives long: the collector need not walk through it between steps.
        gc.collect()
        gc.freeze()
        self._state = RankState.RUNNING
        return address

    def trouble(self, generation: int, timeout_s: float) -> str:
        """Waits until this rank can run no step of `generation` any more, and says why; empty after `timeout_s`."""
        if self._generation == generation and not self._troubled.wait(timeout_s):
            return ""
        return self._trouble or f"generation {generation} is over"

    def interrupt(self, generation: int, timeout_s: float) -> Holdings:
        """Ends the generation in force, for `generation` to follow: the step in progress ends or fails, none begins,
        and the groups are left. Sequences, cache and experts stay. What experts these are.

        Raises Outdated where a later leader has been here, TimeoutError where the step does not end in time.
        """
        if generation <= self._newest:
            raise Outdated(f"generation {generation} is over: rank {self.rank} has heard of {self._newest}")
        self._newest = generation
        if self._session is not None:
            # Front doors hear of it before any of them can have been told to refuse what is older.
            self._session.renumber(generation)
        with self._changing:
            if not self._regroups:
                return Holdings()  # groups that share no steps are not concerned
            self._note_trouble(f"generation {generation} follows")
            self._leave(timeout_s)
            if self._state is RankState.RUNNING:
                self._state = RankState.INTERRUPTED
            return self._experts.holdings() if self._experts is not None else Holdings()

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

        `placements` names the experts of every member, in order of rank, for all layers that have any. Raises
        ValueError where memory does not suffice for this rank's.
        """
        with self._changing:
            if generation != self._newest:
                raise Outdated(f"generation {generation} is over: rank {self.rank} has heard of {self._newest}")
            if not self._regroups:
                self._generation = generation
                return 0
            assert self._experts is not None, "regroup before load"
            self._leave(_STOP_TIMEOUT_S)
            membership = self._meet(generation, (store_host, store_port), addresses, True, _REGROUP_TIMEOUT_S)
            exchange, experts = membership.groups.expert, self._experts
            assert exchange is not None
            assert self._tensor is not None
            self._tensor.follow(membership.groups.tensor)
            places = {layer: _placement(slots) for layer, slots in placements}
            return in_passing_thread(lambda: experts.regroup(epoch, exchange, places), "regroup-experts")

    def _go_on(self, membership: Membership, runner: Runner) -> str | None:
        """Steps of the generation that was joined since; the one that was interrupted is run again."""
        generation = self._generation
        if self._regroups:
            self._troubled.clear()
            self._trouble = ""
            if self._loop is not None:
                assert isinstance(self._execution, FirstRank)
                pulse = self._join_pulse(membership)
                self._execution.regrouped(membership.sender, pulse)
                if pulse is not None:
                    pulse.start()
                self._loop.resume(generation)
            else:
                self._follow(membership, runner)
            self._watch_peers(membership)
            self._state = RankState.RUNNING
        elif self._loop is not None:
            self._loop.renumber(generation)
        return self._session_address or None

    def _leave(self, timeout_s: float) -> None:
        """Leaves the groups with all steps at rest."""
        if self._watch is not None:
            self._watch.end()
        if self._loop is not None:
            self._loop.interrupt(self._trouble)
        self._leave_groups()
        if self._loop is not None and not self._loop.rest(timeout_s):
            raise TimeoutError(f"rank {self.rank}: a step did not end in {timeout_s:g} s")
        if self._follower is not None and not self._follower.stop(timeout_s):
            raise TimeoutError(f"rank {self.rank}: a step did not end in {timeout_s:g} s")
        if self._tensor is not None:
            self._tensor.leave()
        if self._membership is not None:
            self._membership.close()
        self._membership = self._pulse = self._watch = None

    def _note_trouble(self, reason: str) -> None:
        if not self._troubled.is_set():
            self._trouble = reason
            self._troubled.set()

    def _interrupted(self, reason: str) -> None:
        """From the step loop: others must not wait for this rank, and the leader hears of it."""
        self._leave_groups()
        self._note_trouble(reason)

    def _watch_peers(self, membership: Membership) -> None:
        if self.settings.plan.group_size > 1:
            self._watch = membership.watch(self.settings, self._peer_gone)
            self._watch.start()

    def probe(self, timeout_s: float) -> float:
        """Seconds that a real token took through every rank of this first rank's group.

        Raises Broken where the group has failed, TimeoutError where no token comes.
        """
        assert self._loop is not None, "probe before start, or not at the first rank of a group"
        return self._loop.probe(timeout_s)

    def status(self) -> RankStatus:
        settings = self.settings
        report = self._runner.report if self._runner is not None else None
        reason = self._reason()
        kind = self._membership.groups.kind if self._membership is not None else ""
        experts = self._experts.loads() if self._experts is not None else None
        return RankStatus(
            rank=self.rank,
            dp_group=self.place.dp_group,
            state=self._state_now(reason),
            reason=reason or self._trouble,
            host=self._host,
            pid=os.getpid(),
            generation=self._generation,
            newest_generation=self._newest,
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
            plan_port=self._listener.port if self._listener is not None else 0,
            load=self._loop.load if self._loop is not None else None,
            expert_epoch=experts.epoch if experts else 0,
            expert_tokens=sum(map(sum, experts.counts)) if experts else 0,
            warnings=(f"rank {self.rank}: collectives over {kind}",) if kind.startswith("gloo (") else (),
        )

    def _state_now(self, reason: str | None) -> RankState:
        if self._state not in (RankState.RUNNING, RankState.INTERRUPTED):
            return self._state
        if reason:
            return RankState.BROKEN
        return RankState.INTERRUPTED if self._troubled.is_set() else self._state

    def renew(self, lease_s: float) -> None:
        """Keeps the process alive for `lease_s` from now; without a first call it lives on."""
        self._lease.renew(lease_s)

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
        if self._pulse is not None and self._experts.epoch < epoch:
            self._experts.check(epoch)
            self._pulse.offer(epoch)
        self._experts.wait(epoch, timeout_s)

    def record_routing(self, folder: str | None) -> None:
        """Writes what the group's tokens choose from now on into `folder` of this machine; None ends that."""
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
        self._routing_log = RoutingLog(
            Path(folder),
            f"{self.settings.engine}-rank-{self.rank}",
            generation=self._generation,
            layers=[layer for layer in range(config.num_layers) if config.moe.has_experts(layer)],
            num_experts=config.moe.gate.num_experts,
        )
        runner.record_routing(self._routing_log)

    def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what is open; False where that takes longer."""
        drained = self._loop.drain(timeout_s) if self._loop is not None else True
        if self._routing_log is not None:
            self.record_routing(None)  # the process may be killed next, and nothing follows that were worth recording
        return drained

    def stop(self) -> None:
        """Ends every thread and connection; what is open ends as FAILED. Safe to repeat."""
        self._lease.end()
        if self._experts is not None:
            self._experts.end()
        if self._loop is not None:
            was_broken = self._loop.reason is not None
            self._loop.stop(_STOP_TIMEOUT_S)
            if self._execution is not None and not was_broken:
                self._execution.dismiss()
        if self._routing_log is not None:
            self.record_routing(None)
        if self._step_log is not None:
            self._step_log.close()
        if self._session is not None:
            self._session.stop()
        if self._grammars is not None:
            self._grammars.close()
        if self._follower is not None:
            self._follower.stop(_STOP_TIMEOUT_S)
        if self._watch is not None:
            self._watch.end()
        if self._pulse is not None:
            self._pulse.close()
        if self._membership is not None:
            self._membership.close()
        if self._listener is not None:
            self._listener.close()
        self._membership = self._listener = self._session = None
        self._state = RankState.STOPPED

    def _lead(self, membership: Membership, runner: Runner) -> str:
        settings = self.settings
        batcher_settings = BatcherSettings.of(
            settings.scheduling,
            max_batch_size=settings.max_batch_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_model_len=settings.max_model_len,
            block_size=settings.block_size,
            num_blocks=runner.num_blocks,
        )
        info = session_pb2.GroupInfo(
            engine=settings.engine,
            dp_group=self.place.dp_group,
            model=settings.model_name,
            max_model_len=settings.max_model_len,
            max_batch_tokens=settings.max_batch_tokens,
            max_batch_size=settings.max_batch_size,
            block_size=settings.block_size,
            num_blocks=runner.num_blocks,
        )
        if settings.record_routing is not None:
            self.record_routing(settings.record_routing)
        pulse = self._join_pulse(membership)
        self._loop = self._make_loop(membership, runner, pulse, batcher_settings)
        if membership.results is not None:
            membership.results.start(self._wake, self._peer_gone)
        if pulse is not None:
            pulse.start()
        if settings.plan.pipeline == 1:  # tokens are sampled here
            self._grammars = GrammarCompiler.from_folder(settings.model_path, runner.model_config.vocab_size)
        self._session = SessionServer(
            self._loop,
            host=self._host,
            secret=self._secret,
            generation=self._generation,
            info=info,
            vocab_size=runner.model_config.vocab_size,
            records=self._records,
            grammars=self._grammars,
            no_grammars=_NO_TOKENIZER if settings.plan.pipeline == 1 else _NO_GRAMMARS,
        )
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._session_address = f"{host}:{self._session.start()}"
        self._loop.start()
        return self._session_address

    def _make_loop(
        self, membership: Membership, runner: Runner, pulse: Pulse | None, settings: BatcherSettings
    ) -> StepLoop:
        """For a pipeline one with several steps under way."""
        plan = self.settings.plan
        if self.settings.record_steps is not None:
            name = f"{self.settings.engine}-group-{self.place.dp_group}"
            self._step_log = StepLog(Path(self.settings.record_steps), name)
        on_step = None if self._step_log is None else self._step_log.record
        batcher = Batcher(
            settings,
            clock=time.monotonic,
            generation=self._generation,
            # Nobody without the secret can tell which prompt a block's hash stands for.
            prefix_key=hashlib.blake2b(self._secret, digest_size=32, person=b"prefix").digest(),
            num_flights=plan.pipeline,
        )
        if plan.pipeline == 1:
            self._execution = FirstRank(runner, membership.sender, pulse, runner.experts)
            return StepLoop(
                batcher,
                self._execution.run,
                rank=self.rank,
                clock=time.monotonic,
                company=self._execution,
                on_broken=self._broke,
                on_interrupted=self._interrupted if self._regroups else None,
                overlap=self.settings.overlap,
                on_step=on_step,
            )
        assert membership.sender is not None
        assert membership.results is not None
        self._execution = FirstStage(
            runner,
            membership.sender,
            membership.results,
            StageRanks.of(plan, self.place.dp_group),
            step_timeout_s=self.settings.step_timeout_s,
            pulse=pulse,
            experts=runner.experts,
        )
        return PipelinedLoop(
            batcher,
            self._execution,
            rank=self.rank,
            clock=time.monotonic,
            on_broken=self._broke,
            on_step=on_step,
        )

    @property
    def _experts(self) -> Relocation | None:
        return self._runner.experts if self._runner is not None else None

    def _join_pulse(self, membership: Membership) -> Pulse | None:
        """The common beat with the engine's other groups, where they exchange tokens."""
        if not membership.companions:
            return None
        self._pulse = Pulse(
            self._generation,
            membership.companions,
            timeout_s=self.settings.step_timeout_s,
            on_wake=self._wake,
            on_gone=self._peer_gone,
        )
        return self._pulse

    def _wake(self) -> None:
        if self._loop is not None:
            self._loop.wake()

    def _broke(self) -> None:
        self._leave_groups()
        assert self._loop is not None
        self._note_trouble(self._loop.reason or "")

    def _leave_groups(self) -> None:
        """Lets every rank that shares steps with this one know that it takes none any more."""
        if self._membership is not None:
            self._membership.hang_up()
        if self._pulse is not None:
            self._pulse.close()
        if self._experts is not None:
            self._experts.end()

    def _follow(self, membership: Membership, runner: Runner) -> None:
        assert membership.receiver is not None
        self._follower = Follower(
            runner,
            membership.receiver,
            rank=self.rank,
            experts=runner.experts,
            answer=LastStage(membership.answers) if membership.answers is not None else None,
            on_broken=self._note_trouble,
        )
        self._follower.start()

    def _peer_gone(self, reason: str) -> None:
        """At the first rank this ends the loop, or interrupts it where whole groups may go on without the peer; a
        follower's own thread sees that its channel has ended."""
        if self._loop is None:
            return
        if self._regroups:
            self._loop.interrupt(reason)
        else:
            self._loop.fail(reason)

    def _reason(self) -> str | None:
        """Why no step will ever run again. A follower whose group may be regrouped waits for that."""
        reason = None
        if self._loop is not None:
            reason = self._loop.reason
        elif self._follower is not None and not self._regroups:
            reason = self._follower.reason
        return None if reason == STOPPED else reason


def _placement(slots: Sequence[Sequence[int]]) -> ExpertPlacement:
    return ExpertPlacement(max(map(max, slots)) + 1, tuple(map(tuple, slots)))
