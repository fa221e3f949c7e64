"""Between the session's protos and the scheduler's values."""

from __future__ import annotations

import json

from protos.shoal.v1 import inference_pb2, session_pb2
from scheduler.batcher import BatcherLoad
from scheduler.plan import Event, FinishReason, TokenLogprobs
from scheduler.request import Grammar, GrammarKind, Request, SamplingParams

__all__ = [
    "grammar_from_proto",
    "grammar_to_proto",
    "load_to_proto",
    "logprobs_from_proto",
    "logprobs_to_proto",
    "output_from_event",
    "request_from_submit",
    "sampling_from_proto",
    "sampling_to_proto",
]

_FINISH = {
    FinishReason.STOP: session_pb2.FINISH_STOP,
    FinishReason.LENGTH: session_pb2.FINISH_LENGTH,
    FinishReason.CANCELLED: session_pb2.FINISH_CANCELLED,
    FinishReason.DEADLINE: session_pb2.FINISH_DEADLINE,
    FinishReason.REFUSED: session_pb2.FINISH_REFUSED,
    FinishReason.INVALID: session_pb2.FINISH_INVALID,
    FinishReason.FAILED: session_pb2.FINISH_FAILED,
}


def request_from_submit(submit: session_pb2.Submit, *, key: str, now_s: float, vocab_size: int) -> Request:
    """Raises ValueError naming the field for what no model of this vocabulary can run."""
    for name, ids in (("prompt_token_ids", submit.prompt_token_ids), ("output_token_ids", submit.output_token_ids)):
        if ids and max(ids) >= vocab_size:
            raise ValueError(f"{name} must be below {vocab_size}, not {max(ids)}")
    return Request(
        key=key,
        prompt_token_ids=tuple(submit.prompt_token_ids),
        sampling=_sampling(submit.sampling, vocab_size),
        arrival_s=now_s,
        eos_token_ids=frozenset(submit.eos_token_ids),
        output_token_ids=tuple(submit.output_token_ids),
        deadline_s=now_s + submit.timeout_s if submit.HasField("timeout_s") else None,
        priority=submit.priority,
        tenant=submit.tenant,
        request_id=submit.request_id,
        traceparent=submit.traceparent,
    )


def _sampling(message: inference_pb2.SamplingParams, vocab_size: int) -> SamplingParams:
    if message.logit_bias and max(message.logit_bias) >= vocab_size:
        raise ValueError(f"logit_bias must name tokens below {vocab_size}, not {max(message.logit_bias)}")
    return sampling_from_proto(message)


def sampling_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Raises ValueError naming the field."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=max(message.top_k, 0),
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        stop_token_ids=frozenset(message.stop_token_ids),
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        grammar=grammar_from_proto(message.guided) if message.HasField("guided") else None,
    )


def grammar_from_proto(message: inference_pb2.GuidedDecoding) -> Grammar:
    """Raises ValueError where nothing is asked for."""
    kind = message.WhichOneof("guide")
    if kind is None or (kind == "json_object" and not message.json_object):
        raise ValueError("guided must name one of json_schema, json_object, regex, choice and grammar")
    if kind == "json_object":
        text = ""
    elif kind == "choice":
        text = json.dumps(list(message.choice.texts))
    else:
        text = getattr(message, kind)
    whitespace = message.whitespace_pattern if message.HasField("whitespace_pattern") else None
    return Grammar(kind=GrammarKind(kind), text=text, whitespace=whitespace)


def grammar_to_proto(grammar: Grammar) -> inference_pb2.GuidedDecoding:
    """What `grammar_from_proto` reads."""
    message = inference_pb2.GuidedDecoding(whitespace_pattern=grammar.whitespace)
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            message.json_object = True
        case GrammarKind.CHOICE:
            message.choice.texts.extend(json.loads(grammar.text))
        case kind:
            setattr(message, kind.value, grammar.text)
    return message


def sampling_to_proto(sampling: SamplingParams) -> inference_pb2.SamplingParams:
    """What `sampling_from_proto` reads back, but for the grammar, which stays with the first rank."""
    return inference_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def output_from_event(event: Event, sequence_id: int) -> session_pb2.SequenceOutput:
    output = session_pb2.SequenceOutput(sequence_id=sequence_id, position=event.position)
    if event.token_id is not None:
        output.token_ids.append(event.token_id)
    if event.logprobs is not None:
        output.logprobs.append(logprobs_to_proto(event.logprobs))
    if event.prompt_logprobs:
        output.prompt_logprobs.extend(map(logprobs_to_proto, event.prompt_logprobs))
    if event.finish is not None:
        output.finish = _FINISH[event.finish]
        output.error = event.error
        if event.stop_token_id is not None:
            output.stop_token_id = event.stop_token_id
        if event.retry_after_s is not None:
            output.retry_after_s = event.retry_after_s
    if event.queue_s is not None and event.prefill_s is not None:
        output.queue_s = event.queue_s
        output.prefill_s = event.prefill_s
        output.num_cached_tokens = event.num_cached_tokens
    return output


def logprobs_to_proto(entry: TokenLogprobs) -> session_pb2.Logprobs:
    return session_pb2.Logprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top_token_ids=[token_id for token_id, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def logprobs_from_proto(message: session_pb2.Logprobs) -> TokenLogprobs:
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(message.token_id, message.logprob, message.rank, top)


def load_to_proto(load: BatcherLoad) -> session_pb2.Load:
    return session_pb2.Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_waiting_tokens=load.num_waiting_tokens,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
        num_preemptions=load.num_preemptions,
        step_s=load.step_s,
        prefix_hit_tokens=load.prefix_hit_tokens,
        prefix_query_tokens=load.prefix_query_tokens,
        ep_imbalance=load.ep_imbalance,
    )
