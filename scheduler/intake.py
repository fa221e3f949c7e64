"""What becomes of a request on arrival: pure functions of the limits, the request, and what waits already."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.plan import Event, FinishReason
from scheduler.request import Request
from scheduler.sequence import Sequence, State
from scheduler.settings import BatcherSettings
from scheduler.stopping import finish_of, stop_ids_of

__all__ = ["ended_on_arrival", "max_output_tokens", "overflow", "to_shed"]


def ended_on_arrival(settings: BatcherSettings, request: Request) -> Event | None:
    """The only event of a request that cannot run, or that its replayed tokens have already finished."""
    finished = _finished_by_replay(settings, request)
    if finished is not None:
        return finished
    error = _refusal(settings, request)
    if error is None:
        return None
    position = len(request.output_token_ids)
    return Event(key=request.key, position=position, finish=FinishReason.REFUSED, error=error)


def max_output_tokens(settings: BatcherSettings, request: Request) -> int:
    """max_tokens, or what the model's length and the block pool leave of it."""
    room = settings.max_sequence_len - len(request.prompt_token_ids)
    return min(request.sampling.max_tokens, room)


def overflow(settings: BatcherSettings, *, num_waiting: int, num_waiting_tokens: int, num_tokens: int) -> str | None:
    """Why a queue that is so long cannot take `num_tokens` more. An empty one takes anything."""
    if num_waiting >= settings.max_waiting:
        return f"queue full: {num_waiting} requests are waiting, and max_waiting is {settings.max_waiting}"
    if num_waiting and 0 < settings.max_waiting_tokens < num_waiting_tokens + num_tokens:
        return (
            f"queue full: {num_waiting_tokens} tokens are waiting, and max_waiting_tokens is "
            f"{settings.max_waiting_tokens}"
        )
    return None


def to_shed(settings: BatcherSettings, waiting: Iterable[Sequence], request: Request) -> list[Sequence]:
    """The fewest of lower classes, last first, without which the queue could take `request`; none where that fails.

    Nothing that was admitted once, or of which the client has a part, is shed.
    """
    num_waiting = num_waiting_tokens = 0
    lower: list[Sequence] = []
    for sequence in waiting:
        num_waiting += 1
        num_waiting_tokens += len(sequence.token_ids)
        fresh = sequence.state is State.WAITING and not sequence.num_output_tokens
        if fresh and sequence.request.priority > request.priority:
            lower.append(sequence)
    lower.sort(key=lambda sequence: sequence.order)
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    shed: list[Sequence] = []
    while overflow(settings, num_waiting=num_waiting, num_waiting_tokens=num_waiting_tokens, num_tokens=num_tokens):
        if not lower:
            return []
        shed.append(lower.pop())
        num_waiting -= 1
        num_waiting_tokens -= len(shed[-1].token_ids)
    return shed


def _finished_by_replay(settings: BatcherSettings, request: Request) -> Event | None:
    if not request.output_token_ids:
        return None
    # The pool has no say here: another group, with another pool, made these tokens.
    room = settings.max_model_len - len(request.prompt_token_ids)
    position = len(request.output_token_ids)
    token_id = request.output_token_ids[-1]
    finish = finish_of(
        token_id,
        position - 1,
        stop_ids=stop_ids_of(request),
        min_tokens=request.sampling.min_tokens,
        max_output_tokens=min(request.sampling.max_tokens, room),
    )
    if finish is None:
        return None
    stop_token_id = token_id if finish is FinishReason.STOP else None
    return Event(key=request.key, position=position, finish=finish, stop_token_id=stop_token_id)


def _refusal(settings: BatcherSettings, request: Request) -> str | None:
    num_prompt_tokens = len(request.prompt_token_ids)
    num_tokens = num_prompt_tokens + len(request.output_token_ids)
    if num_prompt_tokens == 0:
        return "the prompt is empty"
    if num_prompt_tokens >= settings.max_model_len:
        return (
            f"the prompt has {num_prompt_tokens} tokens; at most {settings.max_model_len - 1} leave room for an answer "
            f"in the model's length of {settings.max_model_len}"
        )
    if num_tokens > settings.max_cached_tokens:
        return (
            f"the sequence has {num_tokens} tokens, and the whole KV cache holds {settings.max_cached_tokens} "
            f"({settings.num_blocks} blocks of {settings.block_size}): shorten the prompt or enlarge the cache"
        )
    return None
