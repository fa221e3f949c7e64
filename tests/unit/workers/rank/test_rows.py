"""What a rank that samples is told gives the tokens that the first rank would have sampled, and the results survive."""

from __future__ import annotations

import dataclasses

import torch

from protos.shoal.v1 import session_pb2
from scheduler.plan import ScheduledSequence, StepPlan
from scheduler.request import SamplingParams
from workers.inputs import StepInputs
from workers.rows import RowWriter, plan_from_rows, result_from_proto, result_to_proto
from workers.sampler import Sampler
from workers.wire import sampling_from_proto, sampling_to_proto

VOCAB_SIZE = 97

SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.75, seed=3, logprobs=2),
    SamplingParams(temperature=1.5, top_k=7, top_p=0.875, min_p=0.0625, seed=-4),
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.25, logprobs=0),
    SamplingParams(logit_bias={3: 1.5, 5: -2.0}, prompt_logprobs=3, min_tokens=2, stop_token_ids=frozenset({4, 9})),
]


def sequence(sampling: SamplingParams, *, num_computed: int, num_tokens: int, num_logits: int) -> ScheduledSequence:
    history = [(7 * place + num_computed) % VOCAB_SIZE for place in range(num_computed + num_tokens)]
    return ScheduledSequence(
        key="k",
        history=history,
        num_prompt_tokens=6,
        num_computed=num_computed,
        num_tokens=num_tokens,
        block_ids=[0, 1],
        num_logits=num_logits,
        samples=num_logits > 0 and num_tokens < 6,
        sampling=sampling,
        forbidden_token_ids=sampling.stop_token_ids,
    )


def test_what_is_sampled_elsewhere_is_the_same() -> None:
    sequences = [sequence(one, num_computed=9, num_tokens=1, num_logits=1) for one in SAMPLINGS]
    sequences.insert(1, sequence(SAMPLINGS[0], num_computed=0, num_tokens=4, num_logits=0))
    sequences.append(sequence(SAMPLINGS[4], num_computed=0, num_tokens=6, num_logits=6))
    plan = StepPlan(generation=2, step=5, sequences=tuple(sequences))
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(sum(one.num_logits for one in sequences), VOCAB_SIZE, generator=generator)
    expected = Sampler().sample(logits, plan)
    message = StepInputs.from_plan(plan).to_proto()
    RowWriter().add(message, plan)
    received = session_pb2.StepPlan.FromString(message.SerializeToString())
    made = Sampler().sample(logits, plan_from_rows(received))
    answer = session_pb2.StepResult.FromString(result_to_proto(received, made).SerializeToString())
    assert (answer.generation, answer.step) == (2, 5)
    assert result_from_proto(answer, len(sequences)) == expected
    assert expected.sequences[-1].prompt_logprobs
    assert expected.sequences[1].token_id is None


def test_history_travels_only_where_it_is_read() -> None:
    sequences = tuple(sequence(one, num_computed=9, num_tokens=1, num_logits=1) for one in SAMPLINGS)
    message = session_pb2.StepPlan()
    RowWriter().add(message, StepPlan(generation=1, step=1, sequences=sequences))
    assert [bool(row.history) for row in message.sampled] == [False, False, False, True, True]


def test_every_sampling_parameter_crosses() -> None:
    """A field that somebody adds and forgets here would be lost on its way."""
    values = {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {3: 1.5},
        "seed": -9,
        "stop_token_ids": frozenset({4}),
        "max_tokens": 99,
        "min_tokens": 3,
        "ignore_eos": True,
        "logprobs": 0,
        "prompt_logprobs": 2,
    }
    assert {*values, "grammar"} == {field.name for field in dataclasses.fields(SamplingParams)}
    sampling = SamplingParams(**values)  # type: ignore[arg-type]
    assert sampling_from_proto(sampling_to_proto(sampling)) == sampling
    assert sampling_from_proto(sampling_to_proto(SamplingParams())) == SamplingParams()
