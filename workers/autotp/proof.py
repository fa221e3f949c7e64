"""Compares a model behind our cache with what it was before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workers.autotp.model import AdoptedModel
from workers.cache import KVCache
from workers.inputs import StepInputs
from workers.step import build_tensors

__all__ = ["Probe", "prove"]

_BLOCK_SIZE = 4
# Of the logits' own size: a wrong mask, position or cut changes them altogether.
_TOLERANCE = {torch.float32: 1e-3}
_ROUNDED_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Probe:
    """`logits` [len(token_ids), vocabulary] in fp32, for every token; none where nothing is compared."""

    token_ids: tuple[int, ...]
    logits: torch.Tensor


@torch.no_grad()
def prove(model: AdoptedModel, probes: Sequence[Probe], *, dtype: torch.dtype, device: torch.device) -> None:
    """Runs the probes in mixed batches. Raises ValueError where the first rank finds other logits."""
    needed = [-(-len(probe.token_ids) // _BLOCK_SIZE) for probe in probes]
    cache = KVCache(model.cache_rows, sum(needed), _BLOCK_SIZE, dtype=dtype, device=device)
    blocks = np.split(np.arange(sum(needed))[::-1], np.cumsum(needed)[:-1])
    done = [0] * len(probes)
    for share in _shares(probes):
        inputs = _inputs(probes, blocks, done, share)
        logits = model.forward(build_tensors(inputs, _BLOCK_SIZE, dtype=dtype, device=device), cache)
        if logits is not None:
            wanted = [
                probe.logits[start : start + count] for probe, start, count in zip(probes, done, share, strict=True)
            ]
            _compare(logits, torch.cat(wanted).to(logits.device), dtype)
        done = [start + count for start, count in zip(done, share, strict=True)]


def _shares(probes: Sequence[Probe]) -> list[list[int]]:
    """How many tokens of each probe three steps take: first chunks, one token each, and what is left."""
    lengths = [len(probe.token_ids) for probe in probes]
    firsts = [max(1, length // 2 + number) for number, length in enumerate(lengths)]
    firsts = [min(first, length - 1) for first, length in zip(firsts, lengths, strict=True)]
    rest = [length - first - 1 for first, length in zip(firsts, lengths, strict=True)]
    return [firsts, [1] * len(probes), rest]


def _inputs(
    probes: Sequence[Probe],
    blocks: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]],
    done: list[int],
    share: list[int],
) -> StepInputs:
    used = [n for n, count in enumerate(share) if count]
    counts = np.array([share[n] for n in used], dtype=np.int64)
    return StepInputs(
        generation=0,
        step=0,
        token_ids=np.array(
            [t for n in used for t in probes[n].token_ids[done[n] : done[n] + share[n]]], dtype=np.int64
        ),
        num_tokens=counts,
        num_computed=np.array([done[n] for n in used], dtype=np.int64),
        block_ids=np.concatenate([blocks[n] for n in used]).astype(np.int64),
        num_blocks=np.array([len(blocks[n]) for n in used], dtype=np.int64),
        num_logits=counts,
    )


def _compare(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """By the part of the logits that is not the same for every token of the vocabulary."""
    size = (wanted - wanted.mean(dim=-1, keepdim=True)).norm()
    error = float((found - wanted).norm() / size.clamp_min(1e-20))
    if not error <= _TOLERANCE.get(dtype, _ROUNDED_TOLERANCE):
        raise ValueError(f"its logits differ from transformers' own by {error:.1%} of their size")
