"""The first rank's part in its DP group: it plans the steps, has all ranks run them, and answers front doors."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from protos.shoal.v1 import session_pb2
from scheduler.batcher import Batcher, BatcherLoad, BatcherSettings
from workers.execution import FirstRank
from workers.group import Membership
from workers.guided import GrammarCompiler
from workers.loop import StepLoop
from workers.pipeline import FirstStage, StageRanks
from workers.pipelined_loop import PipelinedLoop
from workers.records import Records
from workers.runner import Runner
from workers.session import SessionServer
from workers.settings import EngineSettings
from workers.standing import Standing
from workers.step_log import StepLog

__all__ = ["Leading"]

_NO_TOKENIZER = "the model has no tokenizer.json"


class Leading:
    """`on_broken` hears that no step will ever run again; `on_interrupted` why none does until `resume`."""

    def __init__(
        self,
        rank: int,
        settings: EngineSettings,
        secret: bytes,
        standing: Standing,
        runner: Runner,
        *,
        on_broken: Callable[[str], None],
        on_interrupted: Callable[[str], None],
    ) -> None:
        self._rank = rank
        self._settings = settings
        self._secret = secret
        self._standing = standing
        self._runner = runner
        self._on_broken = on_broken
        self._on_interrupted = on_interrupted
        membership = standing.membership
        assert membership is not None, "lead before join"
        name = f"{settings.engine}-group-{settings.plan.place(rank).dp_group}"
        self._step_log = None if settings.record_steps is None else StepLog(Path(settings.record_steps), name)
        self._pulse = standing.join_pulse(self._wake, self.peer_gone)
        self._execution: FirstRank | FirstStage
        self._loop: StepLoop
        if settings.plan.pipeline == 1:
            self._execution, self._loop = self._plain(membership)
        else:  # with several steps under way
            self._execution, self._loop = self._pipelined(membership)
        self._grammars: GrammarCompiler | None = None
        self._session: SessionServer | None = None
        self.address = ""  # of the session server, once it is there

    @property
    def reason(self) -> str | None:
        """Why no step will ever run again; None while some may."""
        return self._loop.reason

    @property
    def load(self) -> BatcherLoad:
        return self._loop.load

    def start(self, host: str) -> str:
        """Takes requests from now on; where."""
        settings, membership = self._settings, self._standing.membership
        assert membership is not None
        if membership.results is not None:
            membership.results.start(self._wake, self.peer_gone)
        if self._pulse is not None:
            self._pulse.start()
        vocab_size = self._runner.model_config.vocab_size
        self._grammars = GrammarCompiler.from_folder(settings.model_path, vocab_size)
        self._session = SessionServer(
            self._loop,
            host=host,
            secret=self._secret,
            generation=self._standing.generation,
            info=self._info(),
            vocab_size=vocab_size,
            records=Records(time.monotonic, keep_s=settings.resume_window_s),
            grammars=self._grammars,
            no_grammars=_NO_TOKENIZER,
        )
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._session.start()}"
        self._loop.start()
        return self.address

    def announce(self, generation: int) -> None:
        """Front doors hear of it before any of them can have been told to refuse what is older."""
        if self._session is not None:
            self._session.renumber(generation)

    def interrupt(self, reason: str) -> None:
        """No step begins until `resume`."""
        self._loop.interrupt(reason)

    def rest(self, timeout_s: float) -> bool:
        """Whether the step in progress ended in time."""
        return self._loop.rest(timeout_s)

    def resume(self, membership: Membership) -> None:
        """Steps of the generation that was joined since; those that were interrupted are run again."""
        self._pulse = self._standing.join_pulse(self._wake, self.peer_gone)
        if isinstance(self._execution, FirstRank):
            self._execution.regrouped(membership.sender, self._pulse)
        else:
            assert membership.sender is not None
            assert membership.results is not None
            self._execution.regrouped(membership.sender, membership.results, self._pulse)
        if self._pulse is not None:
            self._pulse.start()
        self._loop.resume(self._standing.generation)
        if membership.results is not None:  # not before: a loop at rest would not hear that the other end has gone
            membership.results.start(self._wake, self.peer_gone)

    def renumber(self) -> None:
        """The generation has changed without this group, whose steps went on."""
        self._loop.renumber(self._standing.generation)

    def peer_gone(self, reason: str) -> None:
        """Ends the loop, or interrupts it where whole groups may go on without the peer. From any thread."""
        if self._standing.regroups:
            self._loop.interrupt(reason)
        else:
            self._loop.fail(reason)

    def probe(self, timeout_s: float) -> float:
        """See `StepLoop.probe`."""
        return self._loop.probe(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """See `StepLoop.drain`."""
        return self._loop.drain(timeout_s)

    def end_steps(self, timeout_s: float) -> None:
        """What is open ends as FAILED, and the other ranks are told that no step follows."""
        was_broken = self._loop.reason is not None
        self._loop.stop(timeout_s)
        if not was_broken:
            self._execution.dismiss()

    def close(self) -> None:
        """Ends what is left, once steps have ended."""
        if self._step_log is not None:
            self._step_log.close()
        if self._session is not None:
            self._session.stop()
        if self._grammars is not None:
            self._grammars.close()
        self._session = None

    def _plain(self, membership: Membership) -> tuple[FirstRank, StepLoop]:
        execution = FirstRank(self._runner, membership.sender, self._pulse, self._runner.experts)
        loop = StepLoop(
            self._batcher(),
            execution.run,
            rank=self._rank,
            clock=time.monotonic,
            company=execution,
            on_broken=self._broke,
            on_interrupted=self._on_interrupted if self._standing.regroups else None,
            overlap=self._settings.overlap,
            on_step=None if self._step_log is None else self._step_log.record,
        )
        return execution, loop

    def _pipelined(self, membership: Membership) -> tuple[FirstStage, StepLoop]:
        assert membership.sender is not None
        assert membership.results is not None
        plan = self._settings.plan
        execution = FirstStage(
            self._runner,
            membership.sender,
            membership.results,
            StageRanks.of(plan, plan.place(self._rank).dp_group),
            step_timeout_s=self._settings.step_timeout_s,
            pulse=self._pulse,
            experts=self._runner.experts,
        )
        loop = PipelinedLoop(
            self._batcher(),
            execution,
            rank=self._rank,
            clock=time.monotonic,
            on_broken=self._broke,
            on_interrupted=self._on_interrupted if self._standing.regroups else None,
            on_step=None if self._step_log is None else self._step_log.record,
        )
        return execution, loop

    def _batcher(self) -> Batcher:
        settings = self._settings
        return Batcher(
            BatcherSettings.of(
                settings.scheduling,
                max_batch_size=settings.max_batch_size,
                max_batch_tokens=settings.max_batch_tokens,
                max_model_len=settings.max_model_len,
                block_size=settings.block_size,
                num_blocks=self._runner.num_blocks,
            ),
            clock=time.monotonic,
            generation=self._standing.generation,
            # Nobody without the secret can tell which prompt a block's hash stands for.
            prefix_key=hashlib.blake2b(self._secret, digest_size=32, person=b"prefix").digest(),
            num_flights=settings.plan.pipeline,
        )

    def _info(self) -> session_pb2.GroupInfo:
        settings = self._settings
        return session_pb2.GroupInfo(
            engine=settings.engine,
            dp_group=settings.plan.place(self._rank).dp_group,
            model=settings.model_name,
            max_model_len=settings.max_model_len,
            max_batch_tokens=settings.max_batch_tokens,
            max_batch_size=settings.max_batch_size,
            block_size=settings.block_size,
            num_blocks=self._runner.num_blocks,
        )

    def _broke(self) -> None:
        self._on_broken(self._loop.reason or "")

    def _wake(self) -> None:
        self._loop.wake()
