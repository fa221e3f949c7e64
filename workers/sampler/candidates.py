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

__all__ = ["Candidates", "cut", "largest"]

_SIZES = (64, 256, 1024, 4096)
_SIZE_TOP_P = 256
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
    limited: dict[int, list[int]] = {}
    nuclei: list[int] = []
    for row, params in enumerate(sampling):
        if 0 < params.top_k < vocab_size:
            limited.setdefault(_size(params.top_k + _TIE_MARGIN, vocab_size), []).append(row)
        else:
            nuclei.append(row)
    while limited:
        size = min(limited)
        rows = limited.pop(size)
        found, unresolved = _cut_at(scaled, rows, sampling, size)
        yield found
        if unresolved:
            limited.setdefault(_size(size + 1, vocab_size), []).extend(unresolved)
    if nuclei:
        found, unresolved = _cut_at(scaled, nuclei, sampling, min(_SIZE_TOP_P, vocab_size))
        yield found
        if unresolved and scaled.device.type != "cpu":
            # A GPU sorts quickly, and adds up bins in an order of its own.
            yield _cut_at(scaled, unresolved, sampling, vocab_size)[0]
            return
        for row in unresolved:
            yield _nucleus(scaled[row], row, sampling[row])


def _size(wanted: int, vocab_size: int) -> int:
    return min(next((size for size in _SIZES if size >= wanted), vocab_size), vocab_size)


def _cut_at(
    scaled: torch.Tensor, rows: list[int], sampling: Sequence[SamplingParams], size: int
) -> tuple[Candidates, list[int]]:
    """Applies the filters within the `size` likeliest tokens; also the rows whose cut may lie beyond those.

    Either all of `rows` have a top-k that cuts or none has.
    """
    vocab_size, device = scaled.shape[1], scaled.device
    mine = [sampling[row] for row in rows]
    part = scaled if len(rows) == len(scaled) else scaled[rows]
    values, ids = largest(part, size)
    min_p = torch.tensor([[params.min_p] for params in mine], device=device)
    top_p = torch.tensor([[params.top_p] for params in mine], device=device)
    weights = values.exp()
    keep = weights >= min_p  # the likeliest token always passes: its weight is one
    if 0 < mine[0].top_k < vocab_size:
        keep &= torch.arange(size, device=device) < torch.tensor([[params.top_k] for params in mine], device=device)
        probs = values.masked_fill(~keep, -torch.inf).softmax(-1)
    else:
        passing = part.masked_fill(part.exp() < min_p, -torch.inf) if any(params.min_p for params in mine) else part
        probs = passing.softmax(-1).gather(1, ids).masked_fill_(~keep, 0.0)
    before = probs.cumsum(-1) - probs
    keep &= (before < top_p) | (top_p >= 1.0)
    keep[:, 0] = True
    weights *= keep
    if size == vocab_size:
        return Candidates(rows, ids, weights), []
    # A cut is known when something smaller than the last survivor was seen, or when nothing more can be drawn.
    last = keep.sum(-1, keepdim=True) - 1
    known = ((values.gather(1, last) > values[:, -1:]) | torch.isneginf(values[:, -1:]))[:, 0].tolist()
    if all(known):
        return Candidates(rows, ids, weights), []
    index = [number for number, is_known in enumerate(known) if is_known]
    unresolved = [row for row, is_known in zip(rows, known, strict=True) if not is_known]
    return Candidates([rows[number] for number in index], ids[index], weights[index]), unresolved


def _nucleus(scaled: torch.Tensor, row: int, params: SamplingParams) -> Candidates:
    """The min-p and top-p cut of one row of any shape, without sorting it.

    Positive floats are ordered like their bits, so the upper sixteen sort the weights into bins; only the bin that
    the cut goes through is looked at token by token.
    """
    weights = scaled.exp()
    weights.masked_fill_(weights < params.min_p, 0.0)
    bins = weights.view(torch.int32) >> 16
    mass = torch.bincount(bins, weights=weights).flip(0).cumsum(0)
    wanted = params.top_p * float(mass[-1])
    cut_bin = len(mass) - 1 - int(torch.searchsorted(mass, wanted))
    above = (bins > cut_bin).nonzero()[:, 0]
    within = (bins == cut_bin).nonzero()[:, 0]
    values, order = weights[within].sort(descending=True, stable=True)
    before = values.double().cumsum(0) - values
    if cut_bin + 1 < len(mass):
        before += mass[len(mass) - 2 - cut_bin]
    ids = torch.cat([above, within[order[before < wanted]]])
    return Candidates([row], ids[None], weights[ids][None])


def largest(scaled: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest of each row, sorted by value down and then by id up."""
    if size == scaled.shape[1]:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        return values, ids
    values, ids = scaled.topk(size, dim=-1)
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)
