"""Resolved values in the words of the stream to a DP group."""

from __future__ import annotations

from cluster.front_door.call import Call
from cluster.front_door.validate import Prepared, choice_seed
from protos.shoal.v1 import inference_pb2, session_pb2
from scheduler.request import SamplingParams
from workers.wire import grammar_to_proto

__all__ = ["submit_of"]


def submit_of(
    call: Call,
    prepared: Prepared,
    index: int,
    *,
    eos_token_ids: frozenset[int],
    traceparent: str,
    origin: session_pb2.Origin,
) -> session_pb2.Submit:
    """Choice `index` of a call; its sequence id and what is left of its deadline are filled in when it is sent."""
    return session_pb2.Submit(
        request_id=call.request_id,
        prompt_token_ids=prepared.prompt_token_ids,
        sampling=_sampling(prepared.sampling, choice_seed(prepared.sampling.seed, index)),
        priority=call.priority,
        tenant=call.tenant,
        traceparent=traceparent,
        eos_token_ids=sorted(eos_token_ids),
        origin=origin,
    )


def _sampling(params: SamplingParams, seed: int) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=seed,
        stop_token_ids=sorted(params.stop_token_ids),
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        guided=None if params.grammar is None else grammar_to_proto(params.grammar),
    )
