"""When a sequence is at its end: pure functions, the same for a new token and for a replayed one."""

from __future__ import annotations

from scheduler.plan import FinishReason
from scheduler.request import Request

__all__ = ["finish_of", "stop_ids_of"]


def stop_ids_of(request: Request) -> frozenset[int]:
    """The tokens that end the sequence."""
    if request.sampling.ignore_eos:
        return request.sampling.stop_token_ids
    return request.sampling.stop_token_ids | request.eos_token_ids


def finish_of(
    token_id: int,
    position: int,
    *,
    stop_ids: frozenset[int],
    min_tokens: int,
    max_output_tokens: int,
) -> FinishReason | None:
    """Whether `token_id` at output `position` is the last one. A stop token counts as one even at the last position."""
    if token_id in stop_ids and position >= min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if position + 1 >= max_output_tokens else None
