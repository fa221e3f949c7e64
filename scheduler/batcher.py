"""Continuous batching for one DP group: which tokens of which sequences run in the next step.

    batcher.submit(request)
    while batcher.has_work:
        plan = batcher.schedule()
        events = batcher.take_events()                   # refusals, cancels, expiries
        if plan is not None:
            events += batcher.commit(plan, runner.run(plan))

Decoding sequences come first; the rest of the step is shared by prefills. Sequences enter from the queue in the order
of one key. When blocks run out, the running sequence with the largest key gives its own back and is computed again
later; the one with the smallest key always goes on, so some sequence always ends.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from itertools import count

from scheduler.deadlines import Deadlines
from scheduler.draft import Draft, Flight
from scheduler.fairness import FairQueue
from scheduler.gate import Gate, Refusal
from scheduler.intake import ended_on_arrival, max_output_tokens
from scheduler.integrity import check_running, check_waiting
from scheduler.plan import Event, FinishReason, SequenceResult, StepPlan, StepResult
from scheduler.policy import ORDERS, Order, OrderKey
from scheduler.request import Request
from scheduler.sequence import Sequence, State, Trigger
from scheduler.settings import BatcherLoad, BatcherSettings
from scheduler.stopping import finish_of
from scheduler.tables import BlockTables
from scheduler.turns import turns
from scheduler.waiting import Ledger, OrderedQueue, WaitingQueue

__all__ = ["Batcher", "BatcherLoad", "BatcherSettings"]


class Batcher:
    """Owned by the engine loop: one thread calls it. Every request gets exactly one event with a finish."""

    def __init__(
        self,
        settings: BatcherSettings,
        *,
        clock: Callable[[], float],
        generation: int = 0,
        order: Order | None = None,
        queue: WaitingQueue | None = None,
        prefix_key: bytes = b"",
        num_flights: int = 1,
    ) -> None:
        """`num_flights` steps may be in flight together on sequences of their own: the stages of a pipeline."""
        self.settings = settings
        self.num_flights = num_flights
        self.generation = generation
        self._clock = clock
        self._order = ORDERS[settings.order] if order is None else order
        self._tables = BlockTables(settings, prefix_key=prefix_key)
        self._waiting = _queue_of(settings) if queue is None else queue
        self._ledger = self._waiting if isinstance(self._waiting, Ledger) else None
        self._running: list[Sequence] = []  # sorted by `order`
        self._gate = Gate(settings, self._tables, self._waiting, self._running)
        self._open: dict[str, Sequence] = {}
        self._deadlines = Deadlines(max_queue_s=settings.max_queue_s)
        self._events: list[Event] = []
        self._flights: deque[Flight] = deque()  # in the order in which they run
        self._tickets = count()
        self._step = 0
        self._step_s = 0.0
        self._committed_s = 0.0
        self._some_finished = False
        self._num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is open; if so, the next `schedule` either ends one or returns a plan."""
        return bool(self._open)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError where its key is open already; every other refusal is an event."""
        if request.key in self._open:
            raise ValueError(f"key {request.key!r} is already open")
        event = ended_on_arrival(self.settings, request)
        if event is not None:
            self._events.append(event)
            return
        sequence = Sequence.open(
            request,
            order=(*self._order(request), next(self._tickets)),
            max_output_tokens=max_output_tokens(self.settings, request),
        )
        reason = None if self._ledger is None else self._ledger.refusal(sequence)
        if reason is not None:
            self._report(sequence, FinishReason.REFUSED, reason)
            return
        self._open[request.key] = sequence
        self._waiting.push(sequence)
        self._deadlines.open(sequence)
        excess = self._gate.to_shed(sequence)
        if excess is not None:
            for victim in excess[0]:
                self._refuse(victim, excess[1])
        if sequence.state is State.WAITING:
            refusal = self._gate.too_late(sequence, self._clock())
            if refusal is not None and refusal.retry_after_s is None:
                self._end(sequence, FinishReason.DEADLINE, refusal.reason)
            elif refusal is not None:
                self._refuse(sequence, refusal)

    def cancel(self, key: str) -> bool:
        """End a request at once; False where it is not open. What a step in flight makes of it is dropped."""
        sequence = self._open.get(key)
        if sequence is None:
            return False
        self._end(sequence, FinishReason.CANCELLED)
        return True

    def fail(self, error: str) -> None:
        """End every open request with `error`; what is in flight must not be committed."""
        while self._flights:
            for sequence in self._flights.popleft().sequences:
                sequence.num_scheduled = sequence.num_awaited = 0
                if sequence.state is State.ENDING:
                    self._land(sequence)
        self._drop_finished()
        for sequence in list(self._open.values()):
            self._end(sequence, FinishReason.FAILED, error)

    def take_events(self) -> list[Event]:
        """What ended since the last call without a step's result: refused, cancelled, expired, failed."""
        events, self._events = self._events, []
        return events

    def schedule(self) -> StepPlan | None:
        """The next step, or None where no request is left. Each plan must be committed before the next."""
        assert not self._flights, "the last plan was not committed"
        now_s = self._clock()
        self._expire(now_s)
        if self.settings.preempt_lower:
            self._make_way()
        draft = self._new_draft()
        self._schedule_decodes(draft)
        prefills = [one for one in self._running if one.num_scheduled == 0 and one.num_remaining > 1]
        self._schedule_prefills(draft, prefills, now_s)
        plan = self._fly(draft, now_s)
        assert plan is not None or not self._open, "open requests, and none can run"
        return plan

    def schedule_beside(self) -> StepPlan | None:
        """One more step while fewer than `num_flights` are in flight, which may run at once: nothing in it waits for
        what they make. None where nobody is free for one, or somebody must be preempted first: commit, then ask again.

        A step takes its share of the decoding sequences, so that all flights have about as many. Of a prompt the next
        chunk may follow the one in flight.
        """
        if not self._flights:
            return self.schedule()
        assert len(self._flights) < self.num_flights, f"{len(self._flights)} plans are in flight"
        now_s = self._clock()
        self._expire(now_s)
        draft = self._new_draft()
        for flight in self._flights:
            draft.computed_beside |= flight.computing
        free = [sequence for sequence in self._running if _is_free(sequence)]
        decodes = [sequence for sequence in free if sequence.num_remaining == 1][: self._share]
        if not self._grow(decodes):
            return None
        draft.add_decodes(decodes)
        self._schedule_prefills(draft, [sequence for sequence in free if sequence.num_remaining > 1], now_s)
        return self._fly(draft, now_s)

    def schedule_ahead(self) -> StepPlan | None:
        """The step after the one in flight, made while that one runs, as if none of its sequences ended by it.

        It must run after the commit of the one in flight, which puts the tokens that it needs into the histories; what
        it computes for a sequence that has ended by then is dropped. None where the next step cannot be told, because
        somebody must be preempted or nobody can go on: commit, and `schedule`.
        """
        assert len(self._flights) == 1, f"{len(self._flights)} plans are in flight"
        now_s = self._clock()
        self._expire(now_s)
        draft = self._new_draft()
        ready = [sequence for sequence in self._running if _may_go_ahead(sequence)]
        decodes = [sequence for sequence in ready if sequence.num_remaining == 1]
        if not self._grow(decodes):
            return None
        draft.add_decodes(decodes)
        self._schedule_prefills(draft, [sequence for sequence in ready if sequence.num_remaining > 1], now_s)
        return self._fly(draft, now_s)

    def commit(self, plan: StepPlan, result: StepResult, *, step_s: float | None = None) -> list[Event]:
        """Take in the results of the plan in flight: one event for each sequence that sampled a token.

        `step_s` is how long the step ran, where that is known better than by the time since `schedule`.
        """
        assert self._flights, "no plan is in flight"
        flight = self._flights[0]
        assert flight.plan is plan, "not the plan in flight"
        assert len(result.sequences) == len(flight.sequences)
        self._flights.popleft()
        now_s = self._clock()
        self._step_s = now_s - max(flight.scheduled_s, self._committed_s) if step_s is None else step_s
        self._committed_s = now_s
        self._gate.observe_step(flight.num_tokens, len(flight.sequences), self._step_s)
        if self._ledger is not None:
            parts = zip(flight.sequences, plan.sequences, strict=True)
            self._ledger.served(sequence for sequence, part in parts if part.samples)
        events: list[Event] = []
        advance, ending = self._advance, State.ENDING
        for sequence, part, made in zip(flight.sequences, plan.sequences, result.sequences, strict=True):
            sequence.num_computed += part.num_tokens
            sequence.num_scheduled -= part.num_tokens
            if part.samples:
                sequence.num_awaited -= 1
                done = made.complete or made.error
                assert made.token_id is not None or done, f"{sequence.key} was to sample a token"
            if sequence.state is ending:
                if made.token_id is not None:
                    sequence.token_ids.append(made.token_id)  # nobody hears of it, but the next step may run it
                if not sequence.num_scheduled:
                    self._land(sequence)
                continue
            event = advance(sequence, made, now_s)
            if event is not None:
                events.append(event)
        self._drop_finished()
        return events

    def load(self) -> BatcherLoad:
        pool, prefixes = self._tables.pool, self._tables.prefixes
        return BatcherLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_waiting_tokens=self._waiting.num_tokens,
            num_free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            num_preemptions=self._num_preemptions,
            step_s=self._step_s,
            prefix_hit_tokens=0 if prefixes is None else prefixes.num_hit_tokens,
            prefix_query_tokens=0 if prefixes is None else prefixes.num_query_tokens,
        )

    def check_integrity(self) -> None:
        """Assert everything that must hold between two calls. Costs a walk over all sequences and blocks."""
        in_flight = {sequence for flight in self._flights for sequence in flight.sequences}
        waiting = list(self._waiting)
        running = [sequence for sequence in self._running if sequence.state is State.RUNNING]
        assert len(self._running) <= self.settings.max_running
        assert {id(sequence) for sequence in self._open.values()} == {id(s) for s in waiting + running}
        assert len(self._open) == len(waiting) + len(running) == len(self._waiting) + len(running)
        assert self._waiting.num_tokens == sum(len(sequence.token_ids) for sequence in waiting)
        check_waiting(waiting)
        check_running(self._running, in_flight, self._tables.pool)
        assert all(self._open.get(sequence.key) is sequence for sequence in self._deadlines)

    def _expire(self, now_s: float) -> None:
        while (sequence := self._deadlines.expired(now_s)) is not None:
            self._end(sequence, FinishReason.DEADLINE)
        max_queue_s = self.settings.max_queue_s
        waited = f"waited in the queue for {max_queue_s:g} s, the most that max_queue_s allows"
        while (sequence := self._deadlines.waited_out(now_s)) is not None:
            self._refuse(sequence, Refusal(waited, max_queue_s))

    def _make_way(self) -> None:
        """Preempt what is of a lower class than the queue's head, where that gives the head room; else nothing."""
        head = self._waiting.peek()
        victims: list[Sequence] = []
        num_gained = 0
        while head is not None and len(victims) < len(self._running):
            num_staying = len(self._running) - len(victims)
            if num_staying < self.settings.max_running and self._tables.fits(head, num_staying, num_gained=num_gained):
                for victim in victims:
                    self._preempt(victim)
                return
            victim = self._running[num_staying - 1]
            if victim.request.priority <= head.request.priority:
                return
            victims.append(victim)
            num_gained += self._tables.pool.num_owned_alone(victim.block_ids)

    def _new_draft(self) -> Draft:
        return Draft(num_tokens=self.settings.max_batch_tokens, num_prompt_logits=self.settings.max_prompt_logits)

    def _fly(self, draft: Draft, now_s: float) -> StepPlan | None:
        """The draft's plan, in flight from now on; None where nothing is in it."""
        flight = draft.close(generation=self.generation, step=self._step + 1, now_s=now_s)
        if flight is None:
            return None
        self._step += 1
        self._flights.append(flight)
        return flight.plan

    @property
    def _share(self) -> int:
        """How many of the decoding sequences a step takes, that all flights may have as many."""
        if self.num_flights == 1:
            return len(self._running)
        num_decoding = sum(one.num_remaining == 1 and one.state is State.RUNNING for one in self._running)
        return -(-num_decoding // self.num_flights)

    def _grow(self, decodes: list[Sequence]) -> bool:
        """Give those a block that need one for their next token; False, and nothing done, where there are too few."""
        pool = self._tables.pool
        growing = [one for one in decodes if len(one.block_ids) * pool.block_size <= one.num_dispatched]
        if not pool.can_allocate(len(growing)):
            return False
        for sequence in growing:
            # A new list: the runner may not have read the table yet that a plan in flight shows.
            sequence.block_ids = sequence.block_ids + pool.allocate(1)
        return True

    def _schedule_decodes(self, draft: Draft) -> None:
        """Schedule the running sequences that have one token to run; none of the others ever lacks blocks."""
        pool, running = self._tables.pool, self._running
        block_size, share = pool.block_size, self._share
        decodes: list[Sequence] = []
        index = 0
        while index < len(running) and len(decodes) < share:
            sequence = running[index]
            index += 1
            num_tokens = len(sequence.token_ids)
            if num_tokens - sequence.num_computed != 1:
                continue
            if len(sequence.block_ids) * block_size < num_tokens:
                self._make_room()
                if sequence.state is not State.RUNNING:
                    break
                sequence.block_ids += pool.allocate(1)
            decodes.append(sequence)
        draft.add_decodes(decodes)

    def _make_room(self) -> None:
        """Preempt from the end of the running ones until a block is free.

        The walk that calls this goes from the front, so what is preempted is not yet in the draft.
        """
        while not self._tables.pool.can_allocate(1):
            self._preempt(self._running[-1])

    def _preempt(self, victim: Sequence) -> None:
        """Send the last of the running ones back to the queue."""
        assert self._running[-1] is victim
        assert victim.num_scheduled == 0
        self._running.pop()
        victim.apply(Trigger.PREEMPT)
        self._leave(victim)
        victim.num_computed = 0
        victim.was_preempted = True
        self._num_preemptions += 1
        self._waiting.push(victim)

    def _schedule_prefills(self, draft: Draft, prefills: list[Sequence], now_s: float) -> None:
        """Share what the draft has left between these, and those that can be admitted."""
        num_tokens = self._gate.prefill_budget(draft.num_tokens, draft.num_tokens_left)
        draft.limit(num_tokens)
        self._tables.advance(prefills)
        self._admit(prefills, num_tokens, now_s)
        for sequence, to_leave in turns(prefills, num_tokens):
            chunk_tokens = draft.room_for(sequence, to_leave)
            if chunk_tokens and self._tables.claim(sequence, draft.computing, draft.computed_beside):
                draft.add(sequence, chunk_tokens)

    def _admit(self, prefills: list[Sequence], num_tokens: int, now_s: float) -> None:
        """Move the queue's head into the batch, and to the end of `prefills`, while slots, tokens and blocks last.

        A sequence gets the blocks of its whole history at once, so a prefill that began can end; one block for each
        running sequence stays free, so that none is preempted right after.
        """
        num_wanted = sum(sequence.num_remaining for sequence in prefills)
        self._gate.head_lacks_blocks = False
        while num_tokens and len(self._running) < self.settings.max_running:
            sequence = self._waiting.peek()
            if sequence is None or (num_wanted >= num_tokens and len(prefills) >= self.settings.max_prefills):
                return
            refusal = self._gate.too_late(sequence, now_s, alone=True)
            if refusal is not None:
                self._end(sequence, FinishReason.DEADLINE, refusal.reason)
                continue
            if not self._tables.fits(sequence, len(self._running)):
                self._gate.head_lacks_blocks = True
                return
            self._waiting.remove(sequence)
            sequence.apply(Trigger.ADMIT)
            self._deadlines.admitted(sequence)
            if sequence.admitted_s is None:
                sequence.admitted_s = now_s
            self._tables.enter(sequence)
            if self._ledger is not None:
                self._ledger.admitted(sequence, 0 if sequence.was_preempted else sequence.num_remaining)
            insort(self._running, sequence, key=_order_of)
            prefills.append(sequence)
            num_wanted += sequence.num_remaining

    def _advance(self, sequence: Sequence, made: SequenceResult, now_s: float) -> Event | None:
        """What a step made of a sequence that goes on: the event of its new token, where there is one."""
        if sequence.num_computed // self.settings.block_size > sequence.num_published:
            self._tables.publish(sequence)
        if sequence.predicts_prompt:
            sequence.take_prompt_logprobs(made.prompt_logprobs)
        token_id = made.token_id
        if token_id is None:
            return self._end_of_grammar(sequence, made) if made.complete or made.error else None
        position = len(sequence.token_ids) - sequence.num_prompt_tokens
        sequence.token_ids.append(token_id)
        finish = None
        if token_id in sequence.stop_ids or position + 1 >= sequence.max_output_tokens:
            finish = finish_of(
                token_id,
                position,
                stop_ids=sequence.stop_ids,
                min_tokens=sequence.sampling.min_tokens,
                max_output_tokens=sequence.max_output_tokens,
            )
        if made.complete:
            finish = FinishReason.STOP
        if finish is not None:
            self._gate.observe_end(sequence)
            self._stop(sequence)
        return sequence.token_event(token_id, position, made.logprobs, finish, now_s)

    def _end_of_grammar(self, sequence: Sequence, made: SequenceResult) -> Event:
        """The end of a sequence whose grammar allows no token behind what it has."""
        position = sequence.num_output_tokens
        self._gate.observe_end(sequence)
        self._stop(sequence)
        if sequence.state is State.ENDING:
            sequence.token_ids.append(0)  # nobody hears of it, but the next step runs a token here
        finish = FinishReason.INVALID if made.error else FinishReason.STOP
        return Event(key=sequence.key, position=position, finish=finish, error=made.error)

    def _end(
        self, sequence: Sequence, finish: FinishReason, error: str = "", retry_after_s: float | None = None
    ) -> None:
        """End a sequence for a reason of which no step's result tells."""
        if sequence.state is not State.RUNNING:
            self._waiting.remove(sequence)
            sequence.apply(Trigger.END)
            self._forget(sequence)
        else:
            self._stop(sequence)
            self._drop_finished()
        self._report(sequence, finish, error, retry_after_s)

    def _stop(self, sequence: Sequence) -> None:
        """End a running sequence, which keeps its blocks for as long as a step in flight writes to them."""
        if sequence.num_scheduled:
            sequence.apply(Trigger.END_IN_FLIGHT)
        else:
            sequence.apply(Trigger.END)
            self._leave(sequence)
            self._some_finished = True
        self._forget(sequence)

    def _report(
        self, sequence: Sequence, finish: FinishReason, error: str = "", retry_after_s: float | None = None
    ) -> None:
        self._events.append(
            Event(
                key=sequence.key,
                position=sequence.num_output_tokens,
                finish=finish,
                error=error,
                retry_after_s=retry_after_s,
            )
        )

    def _refuse(self, sequence: Sequence, refusal: Refusal) -> None:
        self._end(sequence, FinishReason.REFUSED, refusal.reason, refusal.retry_after_s)

    def _leave(self, sequence: Sequence) -> None:
        """Take everything from a sequence that ran."""
        self._tables.leave(sequence)
        if self._ledger is not None:
            self._ledger.left(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self._open[sequence.key]
        self._deadlines.forget(sequence)

    def _land(self, sequence: Sequence) -> None:
        """Free what a sequence that ended in flight still held."""
        sequence.apply(Trigger.LAND)
        self._leave(sequence)
        self._some_finished = True

    def _drop_finished(self) -> None:
        if self._some_finished:
            self._running[:] = [sequence for sequence in self._running if sequence.state is not State.FINISHED]
            self._some_finished = False


def _may_go_ahead(sequence: Sequence) -> bool:
    """Whether a sequence will surely go on behind what is in flight, if no token ends it."""
    if not sequence.num_scheduled:
        return True
    return (
        sequence.state is State.RUNNING
        and not sequence.predicts_prompt  # which rows are left is told by the results
        and sequence.num_output_tokens + sequence.num_awaited < sequence.max_output_tokens
    )


def _is_free(sequence: Sequence) -> bool:
    """Whether the next step of a sequence waits for nothing that is in flight."""
    if not sequence.num_scheduled:
        return True
    return sequence.state is State.RUNNING and not sequence.num_awaited and not sequence.predicts_prompt


def _queue_of(settings: BatcherSettings) -> WaitingQueue:
    if settings.fairness is None:
        return OrderedQueue()
    return FairQueue(settings.fairness, block_size=settings.block_size)


def _order_of(sequence: Sequence) -> OrderKey:
    return sequence.order
