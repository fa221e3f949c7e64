"""What top-k, top-p and min-p leave of a row, without sorting the vocabulary where that can be helped.

The filters apply in the order min-p, top-k, top-p, each on what the one before left, and top-p renormalises. Where
tokens tie at a cut, the lower id stays. A row's outcome never depends on the rows beside it: rows share a call
only when the call's shape is a function of each row's own parameters, and only with operations that treat rows
apart (a sum over a whole row is a softmax, whose rows torch never splits over threads; a plain sum's it does).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from scheduler.request import SamplingParams

__all__ = ["Candidates", "cut"]

_SIZES = (64, 256, 1024, 4096)
_FIRST_SIZE_TOP_P = 256
_TIE_MARGIN = 8  # how many more than top_k to fetch, so that ties at the cut are usually seen whole


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may still be drawn: for `rows`, ids [rows, n] and relative probabilities, zero where cut."""

    rows: list[int]
    token_ids: torch.Tensor
    weights: torch.Tensor


def cut(scaled: torch.Tensor, sampling: Sequence[SamplingParams]) -> Iterator[Candidates]:
    """Yields each row of `scaled` once.

    `scaled` is [rows, vocab] fp32: logits divided by the temperature, shifted so that a row's maximum is zero.
    Every row has a top_k or a top_p that cuts.
    """
    vocab_size = scaled.shape[1]
    pending: dict[int, list[int]] = {}
    for row, params in enumerate(sampling):
        pending.setdefault(_first_size(params, vocab_size), []).append(row)
    while pending:
        size = min(pending)
        rows = pending.pop(size)
        for part in _by_top_k(rows, sampling, vocab_size):
            found, unresolved = _cut_at(scaled[part], [sampling[row] for row in part], size)
            kept = [row for index, row in enumerate(part) if index not in unresolved]
            if kept:
                keep = [index for index in range(len(part)) if index not in unresolved]
                yield Candidates(kept, found.token_ids[keep], found.weights[keep])
            if unresolved:
                pending.setdefault(_larger(size, vocab_size), []).extend(part[index] for index in sorted(unresolved))


def _first_size(params: SamplingParams, vocab_size: int) -> int:
    wanted = params.top_k + _TIE_MARGIN if 0 < params.top_k < vocab_size else _FIRST_SIZE_TOP_P
    return min(next((size for size in _SIZES if size >= wanted), vocab_size), vocab_size)


def _larger(size: int, vocab_size: int) -> int:
    return min(next((step for step in _SIZES if step > size), vocab_size), vocab_size)


def _by_top_k(rows: list[int], sampling: Sequence[SamplingParams], vocab_size: int) -> Iterator[list[int]]:
    """Rows with and without top-k apart: they take their total from different places."""
    limited = [row for row in rows if 0 < sampling[row].top_k < vocab_size]
    others = [row for row in rows if not 0 < sampling[row].top_k < vocab_size]
    yield from (part for part in (limited, others) if part)


def _cut_at(scaled: torch.Tensor, sampling: list[SamplingParams], size: int) -> tuple[Candidates, set[int]]:
    """Applies the filters within the `size` likeliest tokens; also the rows whose cut may lie beyond them."""
    vocab_size = scaled.shape[1]
    device = scaled.device
    values, ids = _largest(scaled, size)
    min_p = torch.tensor([[params.min_p] for params in sampling], device=device)
    top_p = torch.tensor([[params.top_p] for params in sampling], device=device)
    limits = [params.top_k if 0 < params.top_k < vocab_size else vocab_size for params in sampling]
    weights = values.exp()
    # The likeliest token always passes min-p: its weight is one.
    keep = (weights >= min_p) & (torch.arange(size, device=device) < torch.tensor(limits, device=device)[:, None])
    if limits[0] < vocab_size:
        probs = values.masked_fill(~keep, -torch.inf).softmax(-1)
    else:
        passing = scaled.masked_fill(scaled.exp() < min_p, -torch.inf) if bool((min_p > 0).any()) else scaled
        probs = passing.softmax(-1).gather(1, ids).masked_fill_(~keep, 0.0)
    before = probs.cumsum(-1) - probs
    keep &= (before < top_p) | (top_p >= 1.0)
    keep[:, 0] = True
    if size == vocab_size:
        return Candidates([], ids, weights * keep), set()
    # A cut is known when something smaller than the last survivor was seen, or when nothing more can be drawn.
    last = keep.sum(-1, keepdim=True) - 1
    known = (values.gather(1, last) > values[:, -1:]) | torch.isneginf(values[:, -1:])
    unresolved = {index for index, is_known in enumerate(known[:, 0].tolist()) if not is_known}
    return Candidates([], ids, weights * keep), unresolved


def _largest(scaled: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest of each row, sorted by value down and then by id up."""
    if size == scaled.shape[1]:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        return values, ids
    values, ids = scaled.topk(size, dim=-1)
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)
