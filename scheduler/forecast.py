"""When a request would be answered: from measured steps, from what is ahead of it, and from how long answers get."""

from __future__ import annotations

import math
from collections.abc import Sequence as Several
from dataclasses import dataclass

from scheduler.budget import StepTimeModel
from scheduler.sequence import Sequence

__all__ = ["Backlog", "Estimate", "Forecast"]

_LEAST_FINISHED = 8
_LEAST_STEPS = 32
_DOUBT = 2.0
_RECENT_STEPS = 0.02
_RECENT_ENDS = 0.1
_RECENT_LONGEST = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """What stands before a request, and the `num_running` sequences that will decode beside it.

    `num_ends_needed` sequences must end before there is room for it, and `remaining` are the tokens that each
    running one is expected to make yet (may be empty where none need end). A step holds `chunk_tokens` of prefill. In a
    `contended` group, others are prefilled while the request decodes.
    """

    num_running: int
    num_prefill_tokens: int
    chunk_tokens: int
    contended: bool
    num_ends_needed: int = 0
    remaining: Several[float] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds from now to the first and to the last token."""

    first_token_s: float
    finish_s: float


class Forecast:
    """Learns from steps and from finished sequences."""

    def __init__(self, step_times: StepTimeModel) -> None:
        self._step_times = step_times
        self._prefill_per_step = 0.0
        self._num_finished = 0
        self._share = 0.0
        self._longest = 0.0

    @property
    def ready(self) -> bool:
        """Whether there is data enough to refuse somebody for it."""
        return self._step_times.ready and self._step_times.num_observed >= _LEAST_STEPS

    @property
    def doubt(self) -> float:
        """By what factor estimates may well be too long; it falls towards 1 with the steps seen."""
        return 1.0 + _DOUBT / math.sqrt(max(1, self._step_times.num_observed))

    def observe_step(self, num_prefill_tokens: int) -> None:
        self._prefill_per_step += _RECENT_STEPS * (num_prefill_tokens - self._prefill_per_step)

    def observe_output(self, num_tokens: int, max_tokens: int) -> None:
        """A sequence that could have made `max_tokens` ended by itself after `num_tokens`."""
        self._num_finished += 1
        weight = max(_RECENT_ENDS, 1.0 / self._num_finished)
        self._share += weight * (num_tokens / max_tokens - self._share)
        self._longest = max(float(num_tokens), (1.0 - _RECENT_LONGEST) * self._longest)

    def remaining_tokens(self, sequence: Sequence) -> float:
        """How many tokens a sequence will make yet: all it may, or the share of them that others used.

        No more than the longest answer seen lately: that short answers used all they were allowed says nothing of a
        request that is allowed much more.
        """
        sampling = sequence.request.sampling
        expected: float = sequence.max_output_tokens
        if not sampling.ignore_eos:
            learnt = self._share if self._num_finished >= _LEAST_FINISHED else 0.0
            expected = max(min(learnt * expected, self._longest), sampling.min_tokens)
        return max(expected - sequence.num_output_tokens, 1.0)

    def estimate(self, backlog: Backlog, num_tokens: int, remaining_tokens: float) -> Estimate:
        """For a request with `num_tokens` to prefill and `remaining_tokens` to make."""
        num_running = backlog.num_running
        beside = self._prefill_per_step if backlog.contended else 0.0
        decode_s = self._step_times.step_s(num_running + 1 + beside)
        slot_s = self._slot_wait_s(backlog, decode_s)
        ahead_s = self._prefill_s(backlog.num_prefill_tokens, num_running, backlog.chunk_tokens)
        first_token_s = max(slot_s, ahead_s) + self._prefill_s(num_tokens, num_running, backlog.chunk_tokens)
        return Estimate(first_token_s, first_token_s + (remaining_tokens - 1.0) * decode_s)

    def _prefill_s(self, num_tokens: int, num_decodes: int, chunk_tokens: int) -> float:
        num_whole, rest = divmod(num_tokens, chunk_tokens)
        step_s = self._step_times.step_s
        return num_whole * step_s(num_decodes + chunk_tokens) + (step_s(num_decodes + rest) if rest else 0.0)

    def _slot_wait_s(self, backlog: Backlog, decode_s: float) -> float:
        if backlog.num_ends_needed <= 0 or not backlog.remaining:
            return 0.0
        remaining = sorted(backlog.remaining)
        rounds, index = divmod(backlog.num_ends_needed - 1, len(remaining))
        return (rounds * remaining[-1] + remaining[index]) * decode_s
