"""A sequence while it is open: what the batcher knows of it, and the states it passes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from scheduler.plan import Event, FinishReason, TokenLogprobs
from scheduler.policy import OrderKey
from scheduler.request import Request, SamplingParams
from scheduler.stopping import stop_ids_of

__all__ = ["NO_TOKEN_IDS", "TRANSITIONS", "Sequence", "State", "Trigger"]

NO_TOKEN_IDS: frozenset[int] = frozenset()


class State(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # in the queue, holds no blocks
    RUNNING = "running"  # in the batch, its whole history has blocks
    PREEMPTED = "preempted"  # back in the queue, its blocks taken from it; its history is computed again
    ENDING = "ending"  # its owner has heard the end, a step in flight still writes to its blocks
    FINISHED = "finished"  # holds nothing


class Trigger(Enum):
    """What moves a sequence on."""

    ADMIT = "admit"
    PREEMPT = "preempt"
    END = "end"
    END_IN_FLIGHT = "end in flight"
    LAND = "land"  # the step that held it is over


TRANSITIONS: Mapping[tuple[State, Trigger], State] = {
    (State.WAITING, Trigger.ADMIT): State.RUNNING,
    (State.WAITING, Trigger.END): State.FINISHED,
    (State.RUNNING, Trigger.PREEMPT): State.PREEMPTED,
    (State.RUNNING, Trigger.END): State.FINISHED,
    (State.RUNNING, Trigger.END_IN_FLIGHT): State.ENDING,
    (State.PREEMPTED, Trigger.ADMIT): State.RUNNING,
    (State.PREEMPTED, Trigger.END): State.FINISHED,
    (State.ENDING, Trigger.LAND): State.FINISHED,
}


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """One open request and how far it has come. Only the batcher changes it.

    `token_ids` is prompt and output, `num_computed` of them are in the cache, `num_scheduled` more are in flight, and
    `num_awaited` tokens will come of that. `max_output_tokens` is what max_tokens and the lengths leave.
    `num_prompt_predicted` prompt tokens after the first have their logprobs. `num_published` leading blocks of the
    table were published, or came from the cache.
    """

    request: Request
    key: str
    sampling: SamplingParams
    order: OrderKey
    token_ids: list[int]
    num_prompt_tokens: int
    max_output_tokens: int
    stop_ids: frozenset[int]
    num_prompt_predicted: int
    state: State = State.WAITING
    num_computed: int = 0
    num_scheduled: int = 0
    num_awaited: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    was_preempted: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    admitted_s: float | None = None
    first_token_sent: bool = False

    @classmethod
    def open(cls, request: Request, *, order: OrderKey, max_output_tokens: int) -> Sequence:
        """A waiting sequence; tokens emitted before a replay are history, and their prompt logprobs are delivered."""
        sampling = request.sampling
        wants_prompt_logprobs = sampling.prompt_logprobs is not None and not request.output_token_ids
        return cls(
            request=request,
            key=request.key,
            sampling=sampling,
            order=order,
            token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            num_prompt_tokens=len(request.prompt_token_ids),
            max_output_tokens=max_output_tokens,
            stop_ids=stop_ids_of(request),
            num_prompt_predicted=0 if wants_prompt_logprobs else len(request.prompt_token_ids) - 1,
        )

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_dispatched(self) -> int:
        """Tokens that are in the cache, or will be when all that is in flight has landed."""
        return self.num_computed + self.num_scheduled

    @property
    def num_remaining(self) -> int:
        """Tokens to schedule before the next one can be sampled, where what is in flight brings what it should."""
        return len(self.token_ids) + self.num_awaited - self.num_computed - self.num_scheduled

    @property
    def predicts_prompt(self) -> bool:
        """Whether logprobs of prompt tokens are still to be made."""
        return self.num_prompt_predicted < self.num_prompt_tokens - 1

    def apply(self, trigger: Trigger) -> None:
        """Move to the next state; a pair that the table lacks is our mistake."""
        assert (self.state, trigger) in TRANSITIONS, f"{self.request.key}: {trigger.name} while {self.state.name}"
        self.state = TRANSITIONS[self.state, trigger]

    def forbidden_token_ids(self) -> frozenset[int]:
        """What the next token must not be: nothing may end the sequence before min_tokens."""
        return self.stop_ids if self.num_output_tokens + self.num_awaited < self.sampling.min_tokens else NO_TOKEN_IDS

    def num_logits(self, num_tokens: int) -> int:
        """Rows of logits that the next `num_tokens` tokens need: the last ones, for prompt logprobs and sampling."""
        if self.predicts_prompt:
            end = self.num_dispatched + num_tokens
            return max(0, end - max(self.num_dispatched, self.num_prompt_predicted))
        return int(num_tokens == self.num_remaining)

    def take_prompt_logprobs(self, made: tuple[TokenLogprobs, ...]) -> None:
        """Keep what the rows just computed say of the prompt; row i predicts token i + 1. Sent with the first token."""
        predicted = min(self.num_computed, self.num_prompt_tokens - 1)
        expected = max(0, predicted - self.num_prompt_predicted)
        assert len(made) == expected, f"{self.request.key}: {len(made)} prompt logprobs, not {expected}"
        self.prompt_logprobs += made
        self.num_prompt_predicted += expected

    def _ends(self, token_id: int, position: int) -> bool:
        """Whether a token at this output position is one that ends the sequence."""
        return token_id in self.stop_ids and position >= self.sampling.min_tokens

    def token_event(
        self,
        token_id: int,
        position: int,
        logprobs: TokenLogprobs | None,
        finish: FinishReason | None,
        now_s: float,
    ) -> Event:
        """The event of a new token; the first one also says how long it took and what the prompt was worth."""
        if self.first_token_sent:
            if finish is None:
                return Event(self.key, position, token_id, logprobs)
            stop_token_id = token_id if self._ends(token_id, position) else None
            return Event(self.key, position, token_id, logprobs, (), finish, stop_token_id)
        assert self.admitted_s is not None
        self.first_token_sent = True
        prompt_logprobs = tuple(self.prompt_logprobs)
        self.prompt_logprobs.clear()
        return Event(
            key=self.key,
            position=position,
            token_id=token_id,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish=finish,
            stop_token_id=token_id if finish is not None and self._ends(token_id, position) else None,
            num_cached_tokens=self.num_cached_tokens,
            queue_s=self.admitted_s - self.request.arrival_s,
            prefill_s=now_s - self.admitted_s,
        )
