"""What a DP group will not take on: more than its queue holds, and what it would not finish in time."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

from scheduler.budget import StepTimeModel, prefill_budget
from scheduler.forecast import Backlog, Estimate, Forecast
from scheduler.intake import overflow, to_shed
from scheduler.sequence import Sequence, State
from scheduler.settings import BatcherSettings
from scheduler.tables import BlockTables
from scheduler.waiting import WaitingQueue

__all__ = ["Gate", "Refusal"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """`reason` is fit for the client; without `retry_after_s`, trying again is of no use or nothing is known."""

    reason: str
    retry_after_s: float | None = None


class Gate:
    """Looks at the batcher's queue and running sequences, and changes nothing."""

    def __init__(
        self, settings: BatcherSettings, tables: BlockTables, waiting: WaitingQueue, running: Several[Sequence]
    ) -> None:
        self._settings = settings
        self._tables = tables
        self._waiting = waiting
        self._running = running
        self._step_times = StepTimeModel()
        self._forecast = Forecast(self._step_times)
        self.head_lacks_blocks = False

    def observe_step(self, num_tokens: int, num_sequences: int, step_s: float) -> None:
        self._step_times.observe(num_tokens, step_s)
        self._forecast.observe_step(num_tokens - num_sequences)

    def observe_end(self, sequence: Sequence) -> None:
        """A sequence ended by itself."""
        self._forecast.observe_output(sequence.num_output_tokens, sequence.max_output_tokens)

    def prefill_budget(self, num_decodes: int, max_tokens: int) -> int:
        """Tokens of prefill for a step with so many decodes."""
        return prefill_budget(
            self._step_times,
            num_decodes=num_decodes,
            target_step_s=self._settings.target_step_s,
            min_chunk_tokens=self._settings.min_chunk_tokens,
            max_tokens=max_tokens,
        )

    def to_shed(self, sequence: Sequence) -> tuple[list[Sequence], Refusal] | None:
        """Whom to refuse where the queue overflows by its newest member: some of lower classes, or that one itself."""
        num_tokens = len(sequence.token_ids)
        error = overflow(
            self._settings,
            num_waiting=len(self._waiting) - 1,
            num_waiting_tokens=self._waiting.num_tokens - num_tokens,
            num_tokens=num_tokens,
        )
        if error is None:
            return None
        others = [other for other in self._waiting if other is not sequence]
        retry_after_s = self.estimate(sequence).first_token_s if self._forecast.ready else None
        return to_shed(self._settings, others, sequence.request) or [sequence], Refusal(error, retry_after_s)

    def too_late(self, sequence: Sequence, now_s: float, *, alone: bool = False) -> Refusal | None:
        """Why a waiting sequence would not be finished by its deadline; None where it would, or that cannot be told.

        What a client has a part of is never too late: it goes on for as long as it may.
        """
        deadline_s = sequence.request.deadline_s
        fresh = sequence.state is State.WAITING and not sequence.num_output_tokens
        if deadline_s is None or not (self._settings.refuse_late and fresh and self._forecast.ready):
            return None
        left_s = deadline_s - now_s
        needed_s = self.estimate(sequence, alone=alone).finish_s
        # Who is refused by mistake loses more than who is answered late: the estimate must be beyond doubt.
        if needed_s <= left_s * self._forecast.doubt:
            return None
        reason = f"not to be done by its deadline: about {needed_s:.3g} s are needed, {left_s:.3g} s are left"
        possible = self.estimate(sequence, alone=True).finish_s <= left_s * self._forecast.doubt
        return Refusal(reason, needed_s - left_s if possible else None)

    def estimate(self, sequence: Sequence, *, alone: bool = False) -> Estimate:
        """When a waiting sequence would be answered; `alone`: if it went next, and nothing else had to be prefilled."""
        max_tokens = self._settings.max_batch_tokens
        num_prefill_tokens = num_ends_needed = 0
        if not alone:
            num_ahead, num_prefill_tokens = self._waiting.ahead_of(sequence)
            prefills = [other for other in self._running if other.num_remaining > 1]
            num_prefill_tokens += sum(other.num_remaining for other in prefills)
            num_free_slots = 0 if self.head_lacks_blocks else self._settings.max_running - len(self._running)
            num_ends_needed = max(0, num_ahead + 1 - num_free_slots)
        backlog = Backlog(
            num_running=min(len(self._running), self._settings.max_running - 1),
            num_prefill_tokens=num_prefill_tokens,
            chunk_tokens=max(1, self.prefill_budget(len(self._running), max_tokens)),
            contended=not alone and len(self._waiting) > 1,
            num_ends_needed=num_ends_needed,
            remaining=[self._forecast.remaining_tokens(one) for one in self._running] if num_ends_needed else (),
        )
        num_new_tokens = self._tables.num_new_tokens(sequence)
        return self._forecast.estimate(backlog, num_new_tokens, self._forecast.remaining_tokens(sequence))
