"""A step on the ranks of a DP group: the first rank sends the plan, all run it, the first one samples."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

from protos.shoal.v1 import session_pb2
from scheduler.plan import ScheduledSequence, StepPlan, StepResult
from workers.inputs import StepInputs
from workers.loop import STOPPED
from workers.parallel.channel import PlanReceiver, PlanSender
from workers.parallel.pulse import Pulse
from workers.relocation import Relocation
from workers.sampler import Sampler
from workers.spans import record_step

__all__ = ["FirstRank", "Follower", "Forward"]

log = logging.getLogger(__name__)


class Forward(Protocol):
    """The part of a runner that a step needs."""

    def forward(self, inputs: StepInputs) -> torch.Tensor | None: ...

    def keep_step(self) -> None:
        """Joins the exchanges of a step in which this group has no tokens."""
        ...


class FirstRank:
    """The first rank's side; `sender` is None in a group of one, `pulse` where no other group shares the steps.

    `experts` move between steps, where groups share them.
    """

    def __init__(
        self,
        runner: Forward,
        sender: PlanSender | None,
        pulse: Pulse | None = None,
        experts: Relocation | None = None,
    ) -> None:
        self._runner = runner
        self._sender = sender
        self._pulse = pulse
        self._experts = experts
        self._sampler = Sampler()

    def regrouped(self, sender: PlanSender | None, pulse: Pulse | None) -> None:
        """Other companions from the next step on. Between steps only."""
        self._sender, self._pulse = sender, pulse

    @property
    def pending(self) -> bool:
        return self._pulse is not None and self._pulse.pending

    @property
    def imbalance(self) -> float:
        return 0.0 if self._pulse is None else self._pulse.imbalance

    def keep_step(self) -> None:
        """One beat with the other groups, and the step that may follow from it."""
        has_step = self._beat(0)
        if has_step:
            if self._sender is not None:
                self._sender.send(session_pb2.StepPlan(generation=self._sender.generation))
            self._runner.keep_step()

    def run(self, plan: StepPlan, traceparent: str) -> StepResult:
        """Raises whatever keeps the step from ending; the group is broken then."""
        inputs = StepInputs.from_plan(plan)
        if self._pulse is not None:
            self._beat(plan.num_tokens)
        if self._sender is not None:
            message = inputs.to_proto()
            # A step that is run again was planned in an earlier generation.
            message.generation = self._sender.generation
            message.traceparent = traceparent
            self._sender.send(message)
        logits = self._runner.forward(inputs)
        assert logits is not None, "no logits at the first rank"
        if self._pulse is not None and (going_on := sum(map(_goes_on, plan.sequences))):
            # The others hear of it while tokens are sampled and the next step is planned. Where all end early after
            # all, this group joins a step without tokens.
            self._pulse.announce(going_on)
        return self._sampler.sample(logits, plan)

    def _beat(self, num_tokens: int) -> bool:
        """Whether any group has tokens. Where all are ready for it, experts change places first, on every rank."""
        assert self._pulse is not None
        has_step = self._pulse.beat(num_tokens)
        if epoch := self._pulse.agreed:
            assert self._experts is not None
            self._experts.switch(epoch)
            if self._sender is not None:
                self._sender.send(session_pb2.StepPlan(generation=self._sender.generation, expert_epoch=epoch))
        return has_step

    def dismiss(self) -> None:
        """Tells the followers that no step follows; one that has gone already need not hear it."""
        if self._sender is None:
            return
        with contextlib.suppress(OSError):
            self._sender.send(session_pb2.StepPlan(generation=self._sender.generation, stop=True))


def _goes_on(sequence: ScheduledSequence) -> bool:
    """Whether another step will follow, as far as can be told before this one's token is known."""
    return not sequence.samples or sequence.position + 1 < sequence.sampling.max_tokens


class Follower:
    """Another rank's side: a thread that runs what it is told until it is told to stop."""

    def __init__(
        self,
        runner: Forward,
        receiver: PlanReceiver,
        *,
        rank: int,
        experts: Relocation | None = None,
        answer: Callable[[session_pb2.StepPlan, torch.Tensor], None] | None = None,
        on_broken: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`answer` is handed each step's plan and logits, at a rank that has them. `on_broken` hears why it no
        longer follows, unless it was told to stop."""
        self._runner = runner
        self._answer = answer
        self._on_broken = on_broken
        self._experts = experts
        self._receiver = receiver
        self._rank = rank
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._thread = threading.Thread(target=self._loop, name="follower", daemon=True)

    @property
    def reason(self) -> str | None:
        """Why it no longer follows; None while it does."""
        return self._reason

    def start(self) -> None:
        self._thread.start()

    def fail(self, reason: str) -> None:
        """From any thread; the first reason counts."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
        log.log(
            logging.INFO if reason == STOPPED else logging.ERROR, "rank %d no longer follows: %s", self._rank, reason
        )
        self._receiver.hang_up()
        if reason != STOPPED:
            self._on_broken(reason)

    def stop(self, timeout_s: float) -> bool:
        """Waits for the first rank to dismiss this one, or to go; then leaves. False where a step has not ended yet."""
        self._thread.join(timeout_s)
        self.fail(STOPPED)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        try:
            while self._reason is None:
                message = self._receiver.receive()
                if message.stop:
                    self.fail(STOPPED)
                    return
                self._follow(message)
        except Exception as error:
            if self._reason is None:
                log.debug("follower", exc_info=True)
            self.fail(f"{type(error).__name__}: {error}")

    def _follow(self, message: session_pb2.StepPlan) -> None:
        if message.expert_epoch:
            assert self._experts is not None
            self._experts.switch(message.expert_epoch)
            return
        if not message.num_tokens:
            self._runner.keep_step()
            return
        start_ns = time.time_ns() if message.traceparent else 0
        logits = self._runner.forward(StepInputs.from_proto(message))
        if self._answer is not None:
            assert logits is not None, "no logits at the rank that samples"
            self._answer(message, logits)
        if message.traceparent:
            record_step(
                message.traceparent,
                rank=self._rank,
                step=message.step,
                num_tokens=len(message.token_ids),
                num_sequences=len(message.num_tokens),
                start_ns=start_ns,
            )
