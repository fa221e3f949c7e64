"""Between the client's protobuf messages and the values that the doors share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.front_door.call import Call, Chunk, Guided, Message, SamplingOptions, Usage
from cluster.front_door.comeback import Held
from cluster.front_door.errors import InvalidRequest
from cluster.front_door.model_card import ModelCard
from cluster.front_door.text import TextCodec
from protos.shoal.v1 import inference_pb2 as pb
from scheduler.plan import FinishReason, TokenLogprobs
from workers.wire import grammar_from_proto

__all__ = [
    "Asker",
    "ResponseBuilder",
    "add_generation_prompt",
    "call_of",
    "chat_call_of",
    "chunk_message",
    "held_of",
    "messages_of",
    "model_message",
]

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asker:
    """Who asks, and what the call's metadata say."""

    client: str = ""
    timeout_s: float | None = None
    traceparent: str = ""


def call_of(request: pb.GenerateRequest, asker: Asker, *, request_id: str) -> Call:
    """Unset fields become None, "the server's default". Raises InvalidRequest where it has two names."""
    _check_name(request)
    prompt = request.WhichOneof("prompt")
    return Call(
        model=request.model,
        text=request.text if prompt == "text" else None,
        token_ids=tuple(request.token_ids.ids) if prompt == "token_ids" else None,
        sampling=_options(request.sampling),
        request_id=request.idempotency_key or request_id,
        idempotency_key=request.idempotency_key,
        priority=request.priority,
        tenant=asker.client,
        client=asker.client,
        timeout_s=asker.timeout_s,
        traceparent=asker.traceparent,
        door="grpc",
    )


def chat_call_of(request: pb.ChatRequest, asker: Asker, *, request_id: str) -> Call:
    """Unset fields become None, "the server's default". Raises InvalidRequest where it has two names."""
    _check_name(request)
    return Call(
        model=request.model,
        messages=messages_of(request),
        add_generation_prompt=add_generation_prompt(request),
        sampling=_options(request.sampling),
        request_id=request.idempotency_key or request_id,
        idempotency_key=request.idempotency_key,
        priority=request.priority,
        tenant=asker.client,
        client=asker.client,
        timeout_s=asker.timeout_s,
        traceparent=asker.traceparent,
        door="grpc",
    )


def held_of(request: pb.ResumeRequest, asker: Asker) -> Held | None:
    """What the client brings along, if anything. Raises InvalidRequest."""
    original = request.WhichOneof("original")
    if original is None:
        if request.held:
            raise InvalidRequest("held needs the original request beside it", field="held")
        return None
    call = (
        call_of(request.generate, asker, request_id=request.request_id)
        if original == "generate"
        else chat_call_of(request.chat, asker, request_id=request.request_id)
    )
    call = replace(call, request_id=request.request_id, idempotency_key="")
    return Held(call=call, token_ids=tuple(each.ids for each in request.held), done=frozenset(request.done))


def messages_of(request: pb.ChatRequest) -> tuple[Message, ...]:
    return tuple(Message(message.role, message.content, message.name) for message in request.messages)


def add_generation_prompt(request: pb.ChatRequest) -> bool:
    return request.add_generation_prompt if request.HasField("add_generation_prompt") else True


def chunk_message(chunk: Chunk, request_id: str, card: ModelCard, codec: TextCodec) -> pb.GenerateChunk:
    """What is sent for a chunk; the model's name goes with a choice's first one."""
    message = pb.GenerateChunk(
        request_id=request_id,
        index=chunk.index,
        position=chunk.position,
        token_ids=chunk.token_ids,
        text=chunk.text,
    )
    if chunk.logprobs:
        message.logprobs.extend(_position(each, codec) for each in chunk.logprobs)
    if chunk.prompt_token_ids:
        message.model = card.name
        message.prompt_token_ids.extend(chunk.prompt_token_ids)
        message.prompt_logprobs.extend(_position(each, codec) for each in chunk.prompt_logprobs)
    if chunk.finish is not None:
        message.finish_reason = _FINISH[chunk.finish]
        if chunk.stop_string is not None:
            message.stop_string = chunk.stop_string
        elif chunk.stop_token_id is not None:
            message.stop_token_id = chunk.stop_token_id
    if chunk.usage is not None:
        message.usage.CopyFrom(_usage(chunk.usage))
    return message


def model_message(card: ModelCard) -> pb.Model:
    return pb.Model(
        name=card.name,
        max_model_len=card.max_model_len,
        dtype=card.dtype,
        architecture=card.architecture,
        vocab_size=card.vocab_size,
        created_unix_s=card.created_unix_s,
    )


class ResponseBuilder:
    """Collects the chunks of a call into one response."""

    def __init__(self, request_id: str, card: ModelCard, codec: TextCodec) -> None:
        self._codec = codec
        self._response = pb.GenerateResponse(request_id=request_id, model=card.name)
        self._choices: dict[int, pb.Choice] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, chunk: Chunk) -> None:
        choice = self._choices.setdefault(chunk.index, pb.Choice(index=chunk.index))
        self._texts.setdefault(chunk.index, []).append(chunk.text)
        choice.token_ids.extend(chunk.token_ids)
        choice.logprobs.extend(_position(each, self._codec) for each in chunk.logprobs)
        choice.prompt_logprobs.extend(_position(each, self._codec) for each in chunk.prompt_logprobs)
        if chunk.finish is not None:
            choice.finish_reason = _FINISH[chunk.finish]
            if chunk.stop_string is not None:
                choice.stop_string = chunk.stop_string
            elif chunk.stop_token_id is not None:
                choice.stop_token_id = chunk.stop_token_id
        if chunk.usage is not None:
            self._response.usage.CopyFrom(_usage(chunk.usage))

    def build(self) -> pb.GenerateResponse:
        for index, choice in sorted(self._choices.items()):
            choice.text = "".join(self._texts[index])
            self._response.choices.append(choice)
        return self._response


def _check_name(request: pb.GenerateRequest | pb.ChatRequest) -> None:
    if request.request_id and request.idempotency_key:
        raise InvalidRequest("idempotency_key stands in place of request_id; send one of them", field="request_id")


def _options(params: pb.SamplingParams) -> SamplingOptions:
    has = params.HasField
    return SamplingOptions(
        temperature=_decimal(params.temperature) if has("temperature") else None,
        top_p=_decimal(params.top_p) if has("top_p") else None,
        top_k=params.top_k if has("top_k") else None,
        min_p=_decimal(params.min_p) if has("min_p") else None,
        repetition_penalty=_decimal(params.repetition_penalty) if has("repetition_penalty") else None,
        presence_penalty=_decimal(params.presence_penalty) if has("presence_penalty") else None,
        frequency_penalty=_decimal(params.frequency_penalty) if has("frequency_penalty") else None,
        logit_bias={token_id: _decimal(bias) for token_id, bias in params.logit_bias.items()},
        seed=params.seed if has("seed") else None,
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        max_tokens=params.max_tokens if has("max_tokens") else None,
        min_tokens=params.min_tokens if has("min_tokens") else None,
        ignore_eos=params.ignore_eos if has("ignore_eos") else None,
        n=params.n if has("n") else None,
        logprobs=params.logprobs if has("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if has("prompt_logprobs") else None,
        include_stop_str_in_output=params.include_stop_str_in_output if has("include_stop_str_in_output") else None,
        skip_special_tokens=params.skip_special_tokens if has("skip_special_tokens") else None,
        guided=_guided(params.guided) if has("guided") else None,
    )


def _guided(message: pb.GuidedDecoding) -> Guided:
    try:
        return Guided(grammar_from_proto(message), f"sampling.guided.{message.WhichOneof('guide')}")
    except ValueError as error:
        raise InvalidRequest(f"sampling.{error}", field="sampling.guided") from None


def _decimal(value: float) -> float:
    """The short decimal that the client meant: 0.7, where 32 bits on the wire hold 0.699999988079071."""
    return float(f"{value:.7g}")


def _position(entry: TokenLogprobs | None, codec: TextCodec) -> pb.PositionLogprobs:
    if entry is None:
        return pb.PositionLogprobs()
    top = (_logprob(token_id, logprob, rank, codec) for rank, (token_id, logprob) in enumerate(entry.top, 1))
    return pb.PositionLogprobs(chosen=_logprob(entry.token_id, entry.logprob, entry.rank, codec), top=top)


def _logprob(token_id: int, logprob: float, rank: int, codec: TextCodec) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token_id, logprob=logprob, token=codec.token_bytes(token_id), rank=rank)


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
