"""The sampler's rules once more, in plain numpy over one row, as slowly and obviously as possible."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scheduler.plan import ScheduledSequence

__all__ = ["adjusted", "distribution"]

Row = npt.NDArray[np.float32]


def adjusted(logits: Row, sequence: ScheduledSequence) -> Row:
    sampling = sequence.sampling
    row = logits.astype(np.float32).copy()
    known = list(sequence.history[: sequence.num_computed + sequence.num_tokens])
    output = known[sequence.num_prompt_tokens :]
    for token_id in sequence.forbidden_token_ids:
        row[token_id] = -np.inf
    for token_id, bias in sampling.logit_bias.items():
        row[token_id] += np.float32(bias)
    for token_id in set(known):
        penalty = np.float32(sampling.repetition_penalty)
        row[token_id] = row[token_id] / penalty if row[token_id] > 0 else row[token_id] * penalty
    for token_id in set(output):
        row[token_id] -= np.float32(sampling.frequency_penalty) * np.float32(output.count(token_id))
        row[token_id] -= np.float32(sampling.presence_penalty)
    return row


def distribution(logits: Row, sequence: ScheduledSequence) -> npt.NDArray[np.float64]:
    """Each token's probability of being drawn."""
    sampling = sequence.sampling
    row = adjusted(logits, sequence).astype(np.float64)
    if sampling.greedy:
        return np.asarray(np.arange(len(row)) == row.argmax(), dtype=np.float64)
    probs = _softmax(row / sampling.temperature)
    probs = _renormalised(np.where(probs >= sampling.min_p * probs.max(), probs, 0.0))
    order = sorted(range(len(row)), key=lambda token_id: (-row[token_id], token_id))
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0.0
        probs = _renormalised(probs)
    mass = 0.0
    for place, token_id in enumerate(order):
        if place and mass >= sampling.top_p:
            probs[token_id] = 0.0
        mass += probs[token_id]
    return _renormalised(probs)


def _softmax(row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return _renormalised(np.exp(row - row.max()))


def _renormalised(probs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(probs / probs.sum())
