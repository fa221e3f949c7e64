"""A step through the stages of a pipeline.

    begin(plan)       the first rank sends the plan, runs its own layers and hands the rows on
    ...               each stage runs its layers; the last one samples and sends the tokens back
    collect()         what the oldest step has made, once it is there

Up to as many steps as there are stages are under way, on sequences of their own. A plan goes to the later stages when
the first one has done its part, so that none waits long for another: each wait stays below the step timeout, however
long a step takes.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass

import torch

from protos.shoal.v1 import session_pb2
from scheduler.plan import StepPlan, StepResult
from workers.execution import Forward
from workers.guided import Afar, Opened
from workers.inputs import StepInputs
from workers.parallel.channel import PlanSender
from workers.parallel.plan import ParallelPlan
from workers.parallel.pulse import Pulse
from workers.parallel.results import ResultReceiver, ResultSender
from workers.relocation import Relocation
from workers.rows import RowWriter, allowed_from_rows, plan_from_rows, result_from_proto, result_to_proto
from workers.sampler import Sampler

__all__ = ["FirstStage", "LastStage", "StageRanks"]

# A later stage may take so many times what the first one took, before it counts as hanging.
_PATIENCE = 4.0


@dataclass(frozen=True, slots=True)
class StageRanks:
    """The other ranks of a group, as its first one sees them: its own stage's, the later ones', and who samples."""

    mates: frozenset[int]
    later: frozenset[int]
    sampler: int
    num_stages: int

    @classmethod
    def of(cls, plan: ParallelPlan, dp_group: int) -> StageRanks:
        group = plan.group(dp_group)
        later = group[plan.tensor :]
        return cls(frozenset(group[1 : plan.tensor]), frozenset(later), plan.sampling_rank(dp_group), plan.pipeline)


@dataclass(frozen=True, slots=True)
class _Flight:
    step: int
    num_sequences: int
    grammars: Opened
    patience_s: float


class FirstStage:
    """The first rank's side. Owned by the step loop; `pulse` where other groups share the steps."""

    def __init__(
        self,
        runner: Forward,
        sender: PlanSender,
        results: ResultReceiver,
        ranks: StageRanks,
        *,
        step_timeout_s: float,
        pulse: Pulse | None = None,
        experts: Relocation | None = None,
    ) -> None:
        self._runner = runner
        self._sender = sender
        self._results = results
        self._ranks = ranks
        self._step_timeout_s = step_timeout_s
        self._pulse = pulse
        self._experts = experts
        self._rows = RowWriter()
        self._grammars = Afar()
        self._flights: deque[_Flight] = deque()

    def regrouped(self, sender: PlanSender, results: ResultReceiver, pulse: Pulse | None) -> None:
        """Other connections from the next step on; what was under way is to be begun again. Between steps only."""
        self._sender, self._results, self._pulse = sender, results, pulse
        self._flights.clear()

    @property
    def depth(self) -> int:
        """How many steps may be under way."""
        return self._ranks.num_stages

    @property
    def pending(self) -> bool:
        """Whether other groups wait for this one."""
        return self._pulse is not None and self._pulse.awaited

    @property
    def imbalance(self) -> float:
        return 0.0 if self._pulse is None else self._pulse.imbalance

    @property
    def ready(self) -> bool:
        """Whether `collect` has something to give. From any thread."""
        return self._results.ready

    def begin(self, plan: StepPlan, traceparent: str) -> None:
        """Raises whatever keeps the step from getting on its way."""
        inputs = StepInputs.from_plan(plan)
        self._beat(plan.num_tokens)
        message = inputs.to_proto()
        # A step that is begun again was planned in an earlier generation.
        message.generation = self._sender.generation
        message.traceparent = traceparent
        self._sender.send(message, self._ranks.mates)
        began_s = time.monotonic()
        self._runner.forward(inputs)
        stage_s = time.monotonic() - began_s
        self._sender.send(message, self._ranks.later - {self._ranks.sampler})
        opened = self._grammars.open(plan)
        self._rows.add(message, plan, opened.masks, opened.ended)
        self._sender.send(message, {self._ranks.sampler})
        num_later = self._ranks.num_stages - 1
        patience_s = num_later * (self._step_timeout_s + _PATIENCE * stage_s)
        self._flights.append(_Flight(plan.step, len(plan.sequences), opened, patience_s))
        if len(self._flights) == 1:
            self._results.expect(patience_s)

    def collect(self) -> StepResult:
        """Of the oldest step; only where `ready`."""
        answer, flight = self._results.take(), self._flights.popleft()
        self._results.expect(self._flights[0].patience_s if self._flights else None)
        if answer.step != flight.step:
            raise RuntimeError(f"the last stage answered step {answer.step} instead of {flight.step}")
        return self._grammars.close(flight.grammars, result_from_proto(answer, flight.num_sequences))

    def keep_step(self) -> None:
        """One beat with the other groups, and the step that may follow from it, for which this group has no tokens."""
        if self._beat(0):
            message = session_pb2.StepPlan(generation=self._sender.generation)
            self._sender.send(message, self._ranks.mates)
            self._runner.keep_step()
            self._sender.send(message, self._ranks.later)

    def dismiss(self) -> None:
        """Tells the other ranks that no step follows; one that has gone already need not hear it."""
        with contextlib.suppress(OSError):
            self._sender.send(session_pb2.StepPlan(generation=self._sender.generation, stop=True))

    def _beat(self, num_tokens: int) -> bool:
        """Whether any group has tokens. Where all are ready for it, experts change places first, on every rank."""
        if self._pulse is None:
            return num_tokens > 0
        has_step = self._pulse.beat(num_tokens)
        if epoch := self._pulse.agreed:
            assert self._experts is not None
            self._experts.switch(epoch)
            self._sender.send(session_pb2.StepPlan(generation=self._sender.generation, expert_epoch=epoch))
        return has_step


class LastStage:
    """The side of the rank where logits come out: an `answer` for its `Follower`."""

    def __init__(self, sender: ResultSender) -> None:
        self._sender = sender
        self._sampler = Sampler()

    def __call__(self, message: session_pb2.StepPlan, logits: torch.Tensor) -> None:
        made = self._sampler.sample(logits, plan_from_rows(message), allowed_from_rows(message))
        self._sender.send(result_to_proto(message, made))
