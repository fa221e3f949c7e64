"""One step's tokens: greedy rows by argmax, the others by noise over what their filters leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scheduler.plan import ScheduledSequence, SequenceResult, StepPlan, StepResult, TokenLogprobs
from workers.guided import Allowed, Matching
from workers.sampler.adjust import adjust, needs_adjustment
from workers.sampler.allow import allow_only
from workers.sampler.candidates import cut
from workers.sampler.logprobs import prompt_logprobs, token_logprobs
from workers.sampler.noise import Noise

__all__ = ["Sampler"]

_ROWS_AT_ONCE = 16  # bounds the scratch space of the noise


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that a token is sampled from, and whose it is."""

    sequence: ScheduledSequence
    index: int  # of the sequence in the plan
    logits_row: int


class Sampler:
    """Keeps nothing but what saves time. A row's token depends on its own row and history alone."""

    def __init__(self) -> None:
        self._noise: Noise | None = None
        self._matching = Matching()

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, plan: StepPlan, allowed: Allowed | None = None) -> StepResult:
        """`logits` is [sum of num_logits, vocab] in the plan's order; the batch's results in the same order.

        `allowed` counts the sequences that sample; it is for plans whose grammars another rank follows.
        """
        rows: list[_Row] = []
        prompts: dict[int, tuple[TokenLogprobs, ...]] = {}
        end = 0
        for index, sequence in enumerate(plan.sequences):
            start, end = end, end + sequence.num_logits
            if sequence.samples:
                rows.append(_Row(sequence, index, end - 1))
            if sequence.sampling.prompt_logprobs is not None and sequence.num_logits:
                prompts[index] = prompt_logprobs(logits[start:end], sequence)
        assert end == logits.shape[0], f"{logits.shape[0]} rows of logits for a plan that has {end}"
        results = [SequenceResult(prompt_logprobs=prompts.get(index, ())) for index in range(len(plan.sequences))]
        if any(row.sequence.sampling.grammar is not None for row in rows):
            rows, allowed = self._open(rows, results)
        if rows:
            picked = logits if len(rows) == end else logits[[row.logits_row for row in rows]]
            token_ids, logprobs = self._tokens(picked, rows, allowed)
            for row, token_id in zip(rows, token_ids, strict=True):
                complete = row.sequence.sampling.grammar is not None and self._matching.take(row.sequence, token_id)
                made = logprobs.get(row.index)
                results[row.index] = SequenceResult(token_id, made, prompts.get(row.index, ()), complete)
        return StepResult(tuple(results))

    def _open(self, rows: list[_Row], results: list[SequenceResult]) -> tuple[list[_Row], Allowed | None]:
        """The rows whose grammar, where they have one, lets a token follow; the others' results are final."""
        guided = [row for row in rows if row.sequence.sampling.grammar is not None]
        ends = self._matching.follow([row.sequence for row in guided])
        for row, end in zip(guided, ends, strict=True):
            if end is not None:
                results[row.index].complete, results[row.index].error = end.complete, end.error
        ended = {row.index for row, end in zip(guided, ends, strict=True) if end is not None}
        left = [row for row in rows if row.index not in ended]
        return left, self._matching.allowed([row.sequence for row in left])

    def _tokens(
        self, logits: torch.Tensor, rows: list[_Row], allowed: Allowed | None
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """A token per row of `logits` [rows, vocab], and logprobs by index in the plan where asked for."""
        to_adjust = [number for number, row in enumerate(rows) if needs_adjustment(row.sequence)]
        random = [number for number, row in enumerate(rows) if not row.sequence.sampling.greedy]
        adjusted = logits
        if to_adjust or allowed is not None:
            adjusted = logits.to(torch.float32, copy=True)
            for number in to_adjust:
                adjust(adjusted[number], rows[number].sequence)
        if allowed is not None:
            allow_only(adjusted, allowed)
        token_ids = _argmax(adjusted) if len(random) < len(rows) else [0] * len(rows)
        if random:
            chosen = adjusted if len(random) == len(rows) else adjusted[random]
            drawn = self._draw(chosen.float(), [rows[number].sequence for number in random])
            for number, token_id in zip(random, drawn, strict=True):
                token_ids[number] = token_id
        return token_ids, _chosen_logprobs(logits, rows, token_ids)

    def _draw(self, logits: torch.Tensor, sequences: list[ScheduledSequence]) -> list[int]:
        """A random token per row of fp32 `logits`."""
        vocab_size = logits.shape[1]
        if self._noise is None or (self._noise.vocab_size, self._noise.device) != (vocab_size, logits.device):
            self._noise = Noise(vocab_size, logits.device)
        temperature = torch.tensor([[s.sampling.temperature] for s in sequences], device=logits.device)
        scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
        token_ids = [0] * len(sequences)
        cutting = [n for n, s in enumerate(sequences) if 0 < s.sampling.top_k < vocab_size or s.sampling.top_p < 1.0]
        whole = sorted(set(range(len(sequences))).difference(cutting))
        if cutting:
            part = scaled if not whole else scaled[cutting]
            for found in cut(part, [sequences[number].sampling for number in cutting]):
                numbers = [cutting[row] for row in found.rows]
                picks = self._race(found.weights, [sequences[n] for n in numbers], found.token_ids)
                chosen = found.token_ids.gather(1, torch.tensor(picks, device=logits.device)[:, None])
                for number, token_id in zip(numbers, chosen[:, 0].tolist(), strict=True):
                    token_ids[number] = token_id
        if whole:
            weights = (scaled if not cutting else scaled[whole]).exp_()
            owners = [sequences[number] for number in whole]
            if any(sequence.sampling.min_p for sequence in owners):
                min_p = torch.tensor([[sequence.sampling.min_p] for sequence in owners], device=logits.device)
                weights.masked_fill_(weights < min_p, 0.0)
            for number, token_id in zip(whole, self._race(weights, owners), strict=True):
                token_ids[number] = token_id
        return token_ids

    def _race(
        self, weights: torch.Tensor, sequences: list[ScheduledSequence], token_ids: torch.Tensor | None = None
    ) -> list[int]:
        """The column that wins in each row: the largest weight over noise. Overwrites `weights`."""
        picks: list[int] = []
        for start in range(0, len(sequences), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            picks += self._heat(weights[rows], sequences[rows], None if token_ids is None else token_ids[rows])
        return picks

    def _heat(
        self, weights: torch.Tensor, sequences: list[ScheduledSequence], token_ids: torch.Tensor | None
    ) -> list[int]:
        seeds = [sequence.sampling.seed for sequence in sequences]
        positions = [sequence.position for sequence in sequences]
        assert self._noise is not None
        return _argmax(weights.div_(self._noise.negative(seeds, positions, token_ids)).neg_())


def _argmax(rows: torch.Tensor) -> list[int]:
    """The lowest index of each row's maximum."""
    if rows.device.type == "cpu":
        # numpy's argmax is vectorised; torch's takes six times as long on a CPU.
        picks: list[int] = rows.float().numpy().argmax(-1).tolist()
        return picks
    return rows.argmax(-1).tolist()


def _chosen_logprobs(logits: torch.Tensor, rows: list[_Row], token_ids: list[int]) -> dict[int, TokenLogprobs]:
    """The model's own view of the chosen tokens, by index in the plan, for the rows that ask."""
    numbers = [number for number, row in enumerate(rows) if row.sequence.sampling.logprobs is not None]
    if not numbers:
        return {}
    picked = logits if len(numbers) == len(rows) else logits[numbers]
    num_top = [rows[number].sequence.sampling.logprobs or 0 for number in numbers]
    entries = token_logprobs(picked, [token_ids[number] for number in numbers], num_top)
    return {rows[number].index: entry for number, entry in zip(numbers, entries, strict=True)}
