"""The three values that pass between batcher and runner: a plan, its result, and what follows from it.

    plan = batcher.schedule()
    result = runner.run(plan)
    events = batcher.commit(plan, result)

Prefill, chunked prefill and decode are one thing here: a sequence and a number of its tokens to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from scheduler.request import SamplingParams

__all__ = [
    "Event",
    "FinishReason",
    "ScheduledSequence",
    "SequenceResult",
    "StepPlan",
    "StepResult",
    "TokenLogprobs",
]

# Of three of these, one is made for every sequence in every step: frozen ones would take five times as long to make,
# which at a thousand sequences is as much as all else that scheduling does. Nobody changes them all the same.


@dataclass(slots=True)
class ScheduledSequence:
    """One sequence's part of a step; not to be changed.

    `history` is the sequence's prompt and output so far, a live view that the runner only reads and does not keep;
    `history[num_computed : num_computed + num_tokens]` are the tokens this step runs. `block_ids` cover at least
    `num_computed + num_tokens` tokens. The last `num_logits` rows need logits: none in the middle of a prefill,
    one where a token is sampled, all rows where prompt logprobs are asked for.
    """

    key: str
    history: Sequence[int]
    num_prompt_tokens: int
    num_computed: int
    num_tokens: int
    block_ids: Sequence[int]
    num_logits: int
    samples: bool
    sampling: SamplingParams
    forbidden_token_ids: frozenset[int] = frozenset()  # end-of-sequence tokens while min_tokens holds

    @property
    def position(self) -> int:
        """Output position of the token that this step samples."""
        return self.num_computed + self.num_tokens - self.num_prompt_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One forward pass; `sequences` holds the decoding ones first."""

    generation: int
    step: int
    sequences: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token, its log-probability, its rank (1 is the most likely) and the likeliest alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class SequenceResult:
    """What a step made of one scheduled sequence; not to be changed.

    `prompt_logprobs` has an entry for each prompt token that this step predicted. With `complete`, the sequence's
    grammar lets nothing follow: behind this token or, where there is none, behind what was there. `error` says why the
    grammar cannot be followed any further.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    complete: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results in the order of the plan's sequences."""

    sequences: tuple[SequenceResult, ...]


class FinishReason(Enum):
    """Why a sequence left the DP group."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REFUSED = "refused"
    INVALID = "invalid"  # what was asked for cannot be done, here or elsewhere
    FAILED = "failed"


@dataclass(slots=True)
class Event:
    """Something a sequence's owner must hear: a new token, an end, or both. Not to be changed.

    `position` is the output position of `token_id`, or the number of output tokens where there is none.
    `queue_s` (to the admission) and `prefill_s` (from there) come with the first token. `retry_after_s` is a hint for
    what was refused for a reason that passes.
    """

    key: str
    position: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str = ""
    queue_s: float | None = None
    prefill_s: float | None = None
    retry_after_s: float | None = None
