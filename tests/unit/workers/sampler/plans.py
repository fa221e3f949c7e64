"""Plans for the sampler's tests."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.plan import ScheduledSequence, StepPlan
from scheduler.request import SamplingParams

__all__ = ["decoding", "plan"]


def decoding(
    sampling: SamplingParams,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (4,),
    forbidden: frozenset[int] = frozenset(),
) -> ScheduledSequence:
    """A sequence that samples the token behind `output`."""
    history = [*prompt, *output]
    return ScheduledSequence(
        key="k",
        history=history,
        num_prompt_tokens=len(prompt),
        num_computed=len(history) - 1,
        num_tokens=1,
        block_ids=(),
        num_logits=1,
        samples=True,
        sampling=sampling,
        forbidden_token_ids=forbidden,
    )


def plan(*sequences: ScheduledSequence) -> StepPlan:
    return StepPlan(generation=1, step=1, sequences=sequences)
