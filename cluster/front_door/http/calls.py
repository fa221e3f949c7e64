"""Request bodies to calls: one for each prompt."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cluster.front_door.call import Call, Message, SamplingOptions
from cluster.front_door.chat_template import RESERVED_NAMES
from cluster.front_door.errors import InvalidRequest
from cluster.front_door.http.guided import guided_of
from cluster.front_door.http.schema import ChatBody, CompletionBody, MessageBody
from cluster.front_door.http.seam import HttpLimits

__all__ = ["Asker", "chat_call", "completion_calls", "messages_of", "scores_only", "template_kwargs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asker:
    """Who asks, and what the headers say."""

    client: str = ""
    timeout_s: float | None = None
    traceparent: str = ""
    idempotency_key: str = ""
    held: tuple[int, ...] = ()  # tokens of each choice that came with the stream that broke


def completion_calls(body: CompletionBody, asker: Asker, limits: HttpLimits) -> tuple[Call, ...]:
    """Raises InvalidRequest for what only this endpoint knows."""
    prompts: tuple[str | tuple[int, ...], ...] = body.prompt
    n = 1 if body.n is None else body.n
    if len(prompts) > limits.max_prompts:
        raise InvalidRequest(
            f"prompt has {len(prompts)} prompts; at most {limits.max_prompts} are taken", field="prompt"
        )
    if len(prompts) * n > limits.max_choices:
        message = f"{len(prompts)} prompts with n = {n} are {len(prompts) * n} choices; at most {limits.max_choices}"
        raise InvalidRequest(f"{message} are taken", field="n")
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequest("best_of is not supported yet unless it equals n", field="best_of")
    sampling = _sampling(
        body, max_tokens=_num_to_make(body), logprobs=body.logprobs, prompt_logprobs=_num_prompt_logprobs(body)
    )
    base = _name(body, asker) or f"cmpl-{secrets.token_hex(16)}"
    return tuple(
        _call(
            body,
            asker,
            sampling,
            request_id=base if len(prompts) == 1 else f"{base}-{at}",
            text=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
        )
        for at, prompt in enumerate(prompts)
    )


def chat_call(body: ChatBody, asker: Asker) -> Call:
    """Raises InvalidRequest for what only this endpoint knows."""
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise InvalidRequest("max_tokens and max_completion_tokens differ; send one", field="max_completion_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    if body.top_logprobs is not None and body.top_logprobs < 0:
        raise InvalidRequest(f"top_logprobs must be at least 0, not {body.top_logprobs}", field="top_logprobs")
    return _call(
        body,
        asker,
        _sampling(
            body,
            max_tokens=both[0] if both[0] is not None else both[1],
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        ),
        request_id=_name(body, asker) or f"chatcmpl-{secrets.token_hex(16)}",
        messages=messages_of(body.messages),
        add_generation_prompt=body.add_generation_prompt is not False,
        chat_template_kwargs=template_kwargs(body.chat_template_kwargs),
    )


def messages_of(messages: list[MessageBody]) -> tuple[Message, ...]:
    return tuple(Message(message.role, message.content, message.name or "") for message in messages)


def template_kwargs(given: dict[str, object] | None) -> dict[str, object]:
    """Raises InvalidRequest for a variable that is not the client's to set."""
    if taken := RESERVED_NAMES & (given or {}).keys():
        raise InvalidRequest(f"chat_template_kwargs may not set {sorted(taken)[0]}", field="chat_template_kwargs")
    return given or {}


def scores_only(body: CompletionBody) -> bool:
    """Whether only the prompt is wanted, with its log-probabilities: `echo` and `max_tokens: 0`."""
    return body.echo is True and body.max_tokens == 0


def _name(body: ChatBody | CompletionBody, asker: Asker) -> str:
    """What the client calls the request. Raises InvalidRequest where it has two names."""
    if body.request_id and asker.idempotency_key:
        raise InvalidRequest("Idempotency-Key stands in place of request_id; send one of them", field="request_id")
    return body.request_id or asker.idempotency_key


def _num_to_make(body: CompletionBody) -> int | None:
    # A token is made even where only the prompt is scored; the answer leaves it out.
    return 1 if scores_only(body) else body.max_tokens


def _num_prompt_logprobs(body: CompletionBody) -> int | None:
    if body.echo and body.logprobs is not None:
        return max(body.logprobs, body.prompt_logprobs or 0)
    return body.prompt_logprobs


def _sampling(body: ChatBody | CompletionBody, **more: int | None) -> SamplingOptions:
    return SamplingOptions(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias or {},
        seed=body.seed,
        stop=body.stop or (),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        n=body.n,
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        guided=guided_of(body),
        **more,
    )


def _call(
    body: ChatBody | CompletionBody, asker: Asker, sampling: SamplingOptions, *, request_id: str, **prompt: object
) -> Call:
    timeouts_s = [each for each in (body.timeout, asker.timeout_s) if each is not None]
    return Call(
        model=body.model,
        sampling=sampling,
        request_id=request_id,
        idempotency_key=request_id if asker.idempotency_key else "",
        held=asker.held,
        priority=body.priority or 0,
        client=asker.client,
        tenant=asker.client,
        timeout_s=min(timeouts_s, default=None),
        traceparent=asker.traceparent,
        door="http",
        **prompt,  # type: ignore[arg-type]
    )
