"""Log-probabilities of the model's own distribution: fp32, before penalties, bias, temperature and filters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from scheduler.plan import ScheduledSequence, TokenLogprobs
from workers.sampler.candidates import largest

__all__ = ["prompt_logprobs", "token_logprobs"]

_TIE_MARGIN = 8  # how many more to fetch than are wanted, so that ties at the end are usually seen whole
_ROWS_AT_ONCE = 64  # bounds the fp32 copy: 64 rows of a vocabulary of 150,000 are 38 MB


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """One entry per row of `logits` [rows, vocab] for the given token and that many alternatives.

    Tokens of equal probability rank by id, so a greedy choice always has rank 1.
    """
    entries: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        entries.extend(_entries(logits[rows], token_ids[rows], num_top[rows]))
    return entries


def _entries(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> Iterator[TokenLogprobs]:
    logprobs = logits.float().log_softmax(-1)
    values = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    tops = _tops(logprobs, num_top)
    for row, token_id, value, top in zip(logprobs, token_ids, values[:, 0].tolist(), tops, strict=True):
        rank = 1 + torch.count_nonzero(row > value) + torch.count_nonzero(row[:token_id] == value)
        yield TokenLogprobs(token_id, value, int(rank), top)


def _tops(logprobs: torch.Tensor, num_top: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """Each row's likeliest tokens, ties by id."""
    vocab_size = logprobs.shape[1]
    if not any(num_top):
        return [()] * len(num_top)
    size = min(max(num_top) + _TIE_MARGIN, vocab_size)
    values, ids = largest(logprobs, size)
    tops = []
    for row, count in enumerate(min(count, vocab_size) for count in num_top):
        row_ids, row_values = ids[row].tolist(), values[row].tolist()
        if count and size < vocab_size and row_values[count - 1] == row_values[-1]:
            # More tokens tie at the end than were fetched.
            tied = (logprobs[row] >= row_values[-1]).nonzero()[:, 0]
            ordered, order = logprobs[row][tied].sort(descending=True, stable=True)
            row_ids, row_values = tied[order].tolist(), ordered.tolist()
        tops.append(tuple(zip(row_ids[:count], row_values[:count], strict=True)))
    return tops


def prompt_logprobs(logits: torch.Tensor, sequence: ScheduledSequence) -> tuple[TokenLogprobs, ...]:
    """Entries for the prompt tokens that this step's rows predict; `logits` are the sequence's rows."""
    num_top = sequence.sampling.prompt_logprobs
    if num_top is None:
        return ()
    first = sequence.num_computed + sequence.num_tokens - sequence.num_logits + 1
    predicted = sequence.history[first : min(first + sequence.num_logits, sequence.num_prompt_tokens)]
    if not len(predicted):
        return ()
    return tuple(token_logprobs(logits[: len(predicted)], list(predicted), [num_top] * len(predicted)))
