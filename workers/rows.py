"""What sampling at another rank than the first one needs, and what comes back: between our values and protos.

A step's plan names, for each sequence with rows of logits, what its token is chosen by. That is a few numbers, and
the sequence's history only where penalties or logprobs of the prompt read it: the noise is a function of seed,
position and token id, so the rank that samples keeps nothing between steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from protos.shoal.v1 import inference_pb2, session_pb2
from scheduler.plan import ScheduledSequence, SequenceResult, StepPlan, StepResult
from scheduler.request import SamplingParams
from workers.guided import Allowed
from workers.wire import logprobs_from_proto, logprobs_to_proto, sampling_from_proto, sampling_to_proto

__all__ = ["RowWriter", "allowed_from_rows", "plan_from_rows", "result_from_proto", "result_to_proto"]

_KNOWN = 4096


class RowWriter:
    """Writes sequences into plans; remembers what their sampling parameters look like on the wire."""

    def __init__(self) -> None:
        # By identity: parameters may hold what has no hash, and are kept here so that it cannot be another's.
        self._known: dict[int, tuple[SamplingParams, bytes]] = {}

    def add(
        self,
        message: session_pb2.StepPlan,
        plan: StepPlan,
        masks: Mapping[int, bytes] = MappingProxyType({}),
        ended: Collection[int] = (),
    ) -> None:
        """Names every sequence of `plan` that has rows of logits. `masks` say which tokens may come in those that have
        a grammar, by index in the plan; those whose grammar has `ended` sample nothing."""
        for index, sequence in enumerate(plan.sequences):
            if sequence.num_logits:
                message.sampled.add(
                    index=index,
                    samples=sequence.samples and index not in ended,
                    allowed=masks.get(index),
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    sampling=self._sampling(sequence.sampling),
                    forbidden_token_ids=sequence.forbidden_token_ids,
                    history=_history(sequence),
                )

    def _sampling(self, sampling: SamplingParams) -> bytes:
        known = self._known.get(id(sampling))
        if known is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            known = self._known[id(sampling)] = (sampling, sampling_to_proto(sampling).SerializeToString())
        return known[1]


def _history(sequence: ScheduledSequence) -> list[int]:
    sampling = sequence.sampling
    penalised = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
    return list(sequence.history) if penalised or sampling.prompt_logprobs is not None else []


def plan_from_rows(message: session_pb2.StepPlan) -> StepPlan:
    """A plan for the sampler: of the sequences that have rows of logits, in the plan's order."""
    sequences = []
    for row in message.sampled:
        index = row.index
        sequences.append(
            ScheduledSequence(
                key="",
                history=row.history,
                num_prompt_tokens=row.num_prompt_tokens,
                num_computed=message.num_computed[index],
                num_tokens=message.num_tokens[index],
                block_ids=(),
                num_logits=message.num_logits[index],
                samples=row.samples,
                sampling=_sampling_of(row.sampling),
                forbidden_token_ids=frozenset(row.forbidden_token_ids),
            )
        )
    return StepPlan(generation=message.generation, step=message.step, sequences=tuple(sequences))


def allowed_from_rows(message: session_pb2.StepPlan) -> Allowed | None:
    """What may come in the guided ones of the sequences that sample; None where there are none."""
    masks = [row.allowed if row.HasField("allowed") else None for row in message.sampled if row.samples]
    rows = [number for number, mask in enumerate(masks) if mask is not None]
    if not rows:
        return None
    bits = [np.frombuffer(mask, dtype="<i4") for mask in masks if mask is not None]
    return Allowed(rows, np.stack(bits))


@lru_cache(maxsize=_KNOWN)
def _sampling_of(data: bytes) -> SamplingParams:
    return sampling_from_proto(inference_pb2.SamplingParams.FromString(data))


def result_to_proto(message: session_pb2.StepPlan, result: StepResult) -> session_pb2.StepResult:
    """`result` is of `plan_from_rows(message)`."""
    answer = session_pb2.StepResult(generation=message.generation, step=message.step)
    for row, made in zip(message.sampled, result.sequences, strict=True):
        answer.rows.add(
            index=row.index,
            token_id=made.token_id,
            logprobs=None if made.logprobs is None else logprobs_to_proto(made.logprobs),
            prompt_logprobs=map(logprobs_to_proto, made.prompt_logprobs),
        )
    return answer


def result_from_proto(answer: session_pb2.StepResult, num_sequences: int) -> StepResult:
    """For all sequences of the plan; those without rows of logits have nothing."""
    found = {row.index: row for row in answer.rows}
    return StepResult(tuple(_made(found.get(index)) for index in range(num_sequences)))


def _made(row: session_pb2.RowResult | None) -> SequenceResult:
    if row is None:
        return SequenceResult()
    return SequenceResult(
        row.token_id if row.HasField("token_id") else None,
        logprobs_from_proto(row.logprobs) if row.HasField("logprobs") else None,
        tuple(map(logprobs_from_proto, row.prompt_logprobs)),
    )
