"""What changes a row of logits before the temperature: bias, penalties, forbidden tokens.

The order is vLLM's: forbidden tokens, logit bias, repetition, frequency, presence. Repetition counts prompt and
output (Keskar et al. 2019, as in transformers: positive logits are divided, the others multiplied); frequency and
presence count the output only, as OpenAI defines them.
"""

from __future__ import annotations

from collections import Counter

import torch

from scheduler.plan import ScheduledSequence

__all__ = ["adjust", "needs_adjustment"]


def needs_adjustment(sequence: ScheduledSequence) -> bool:
    sampling = sequence.sampling
    return bool(
        (sequence.forbidden_token_ids and sampling.grammar is None)  # a grammar's mask sees to them
        or sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty
        or sampling.presence_penalty
    )


def adjust(row: torch.Tensor, sequence: ScheduledSequence) -> None:
    """Changes `row`, fp32 logits [vocab], in place."""
    sampling = sequence.sampling
    vocab_size = row.shape[0]
    # An end-of-sequence id beyond the vocabulary can never be drawn, so it need not be forbidden.
    forbidden = [token_id for token_id in sequence.forbidden_token_ids if token_id < vocab_size]
    if forbidden and sampling.grammar is None:
        row[torch.tensor(forbidden, device=row.device)] = -torch.inf
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device)
    num_known = sequence.num_computed + sequence.num_tokens
    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(sequence.history[:num_known])), device=row.device)
        values = row[ids]
        penalty = sampling.repetition_penalty
        row[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        output = sequence.history[sequence.num_prompt_tokens : num_known]
        if len(output):
            counted = Counter(output)
            ids = torch.tensor(list(counted), device=row.device)
            counts = torch.tensor(list(counted.values()), dtype=row.dtype, device=row.device)
            row[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
