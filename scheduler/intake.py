"""What becomes of a request on arrival: pure functions of the limits and the request."""

from __future__ import annotations

from scheduler.plan import Event, FinishReason
from scheduler.request import Request
from scheduler.settings import BatcherSettings
from scheduler.stopping import finish_of, stop_ids_of

__all__ = ["ended_on_arrival", "max_output_tokens"]


def ended_on_arrival(settings: BatcherSettings, request: Request, num_waiting: int) -> Event | None:
    """The only event of a request that cannot run, or that its replayed tokens have already finished."""
    finished = _finished_by_replay(settings, request)
    if finished is not None:
        return finished
    error = _refusal(settings, request, num_waiting)
    if error is None:
        return None
    position = len(request.output_token_ids)
    return Event(key=request.key, position=position, finish=FinishReason.REFUSED, error=error)


def max_output_tokens(settings: BatcherSettings, request: Request) -> int:
    """max_tokens, or what the model's length and the block pool leave of it."""
    room = settings.max_sequence_len - len(request.prompt_token_ids)
    return min(request.sampling.max_tokens, room)


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


def _refusal(settings: BatcherSettings, request: Request, num_waiting: int) -> str | None:
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
    if num_waiting >= settings.max_waiting:
        return f"queue full: {num_waiting} requests are waiting, and max_waiting is {settings.max_waiting}"
    return None
