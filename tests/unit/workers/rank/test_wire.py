"""Protos to values and back."""

from __future__ import annotations

import pytest

from protos.shoal.v1 import inference_pb2, session_pb2
from scheduler.batcher import BatcherLoad
from scheduler.plan import Event, FinishReason, TokenLogprobs
from workers.wire import load_to_proto, output_from_event, request_from_submit


def submit(**fields: object) -> session_pb2.Submit:
    sampling = inference_pb2.SamplingParams(
        temperature=0.5,
        top_p=0.75,
        top_k=-1,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 1.5},
        seed=-7,
        stop_token_ids=[4],
        max_tokens=10,
        min_tokens=2,
        ignore_eos=True,
        logprobs=0,
    )
    defaults: dict[str, object] = {
        "sequence_id": 9,
        "request_id": "r",
        "prompt_token_ids": [1, 2],
        "output_token_ids": [3],
        "sampling": sampling,
        "priority": -1,
        "tenant": "t",
        "timeout_s": 2.5,
        "traceparent": "00-0-0-01",
        "eos_token_ids": [2],
    }
    return session_pb2.Submit(**{**defaults, **fields})  # type: ignore[arg-type]


def test_a_submit_becomes_a_request() -> None:
    request = request_from_submit(submit(), key="1:9", now_s=100.0, vocab_size=50)
    assert (request.key, request.request_id, request.tenant, request.priority) == ("1:9", "r", "t", -1)
    assert (request.prompt_token_ids, request.output_token_ids) == ((1, 2), (3,))
    assert (request.arrival_s, request.deadline_s) == (100.0, 102.5)
    assert request.eos_token_ids == {2}
    assert request.traceparent == "00-0-0-01"
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 0, 0.25)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (dict(sampling.logit_bias), sampling.seed, set(sampling.stop_token_ids)) == ({3: 1.5}, -7, {4})
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (10, 2, True)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (0, None)


def test_no_timeout_is_no_deadline() -> None:
    message = submit()
    message.ClearField("timeout_s")
    assert request_from_submit(message, key="k", now_s=1.0, vocab_size=50).deadline_s is None


@pytest.mark.parametrize("field", ["prompt_token_ids", "output_token_ids"])
def test_tokens_beyond_the_vocabulary_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be below 50, not 50"):
        request_from_submit(submit(**{field: [1, 50]}), key="k", now_s=0.0, vocab_size=50)


def test_every_part_of_an_event_arrives() -> None:
    event = Event(
        key="1:9",
        position=4,
        token_id=7,
        logprobs=TokenLogprobs(7, -0.5, 2, ((8, -0.25),)),
        prompt_logprobs=(TokenLogprobs(1, -1.0, 1),),
        finish=FinishReason.STOP,
        stop_token_id=0,
        num_cached_tokens=16,
        error="e",
        queue_s=0.5,
        prefill_s=0.25,
        retry_after_s=1.5,
    )
    expected = session_pb2.SequenceOutput(
        sequence_id=9,
        position=4,
        token_ids=[7],
        logprobs=[
            session_pb2.Logprobs(token_id=7, logprob=-0.5, rank=2, top_token_ids=[8], top_logprobs=[-0.25]),
        ],
        prompt_logprobs=[session_pb2.Logprobs(token_id=1, logprob=-1.0, rank=1)],
        finish=session_pb2.FINISH_STOP,
        stop_token_id=0,
        num_cached_tokens=16,
        error="e",
        queue_s=0.5,
        prefill_s=0.25,
        retry_after_s=1.5,
    )
    assert output_from_event(event, 9) == expected


@pytest.mark.parametrize("finish", FinishReason)
def test_every_end_has_its_word_on_the_wire(finish: FinishReason) -> None:
    output = output_from_event(Event(key="k", position=0, finish=finish), 1)
    assert session_pb2.Finish.Name(output.finish) == f"FINISH_{finish.name}"
    assert not output.token_ids


def test_load_arrives() -> None:
    names = [field.name for field in session_pb2.Load.DESCRIPTOR.fields]
    load = BatcherLoad(**{name: number for number, name in enumerate(names, start=1)})
    message = load_to_proto(load)
    assert [getattr(message, name) for name in names] == list(range(1, len(names) + 1))
