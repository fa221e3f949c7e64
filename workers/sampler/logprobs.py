"""Log-probabilities of the model's own distribution: fp32, before penalties, bias, temperature and filters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from scheduler.plan import ScheduledSequence, TokenLogprobs

__all__ = ["prompt_logprobs", "token_logprobs"]

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
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    values = logprobs.gather(1, chosen)
    ids = torch.arange(logits.shape[1], device=logits.device)
    ranks = ((logprobs > values) | ((logprobs == values) & (ids < chosen))).sum(-1) + 1
    tops = [_top(row, count) if count else () for row, count in zip(logprobs, num_top, strict=True)]
    for token_id, value, rank, top in zip(token_ids, values[:, 0].tolist(), ranks.tolist(), tops, strict=True):
        yield TokenLogprobs(token_id, value, rank, top)


def _top(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest of one row, ties by id."""
    count = min(count, logprobs.shape[0])
    smallest = logprobs.topk(count).values[-1]
    ids = (logprobs >= smallest).nonzero()[:, 0]
    values, order = logprobs[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order[:count]].tolist(), values[:count].tolist(), strict=True))


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
