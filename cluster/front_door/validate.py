"""A client's call against the model and the limits: either everything resolved, or `InvalidRequest` naming the field.

`resolve` looks at all that needs no tokenizer, so that a bad value costs nothing; `fit` then fixes the length.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass

from cluster.front_door.call import Call, SamplingOptions
from cluster.front_door.errors import InvalidRequest, ModelNotFound
from cluster.front_door.limits import Limits
from cluster.front_door.model_card import ModelCard
from scheduler.request import SamplingParams

__all__ = ["Prepared", "Resolved", "check_model", "check_token_ids", "choice_seed", "fit", "resolve"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """Everything of a call but its prompt; `max_tokens` None means what fits."""

    options: SamplingOptions
    n: int
    seed: int
    top_k: int
    max_tokens: int | None
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A call that can be run. The choices share `sampling` but for the seed: see `choice_seed`."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`; the first choice keeps the call's own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_model(name: str, card: ModelCard) -> None:
    """Raises ModelNotFound naming the model that is served."""
    if not card.answers_to(name):
        raise ModelNotFound(f"the model {_short(name)} is not served here; {card.name!r} is", field="model")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raises InvalidRequest naming the first id out of the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        at, bad = next((at, i) for at, i in enumerate(token_ids) if not 0 <= i < vocab_size)
        raise InvalidRequest(f"{field}[{at}] is {bad}; token ids are 0 to {vocab_size - 1}", field=field)


def resolve(call: Call, card: ModelCard, limits: Limits) -> Resolved:
    """Checks all of a call that does not need its prompt's tokens."""
    check_model(call.model, card)
    _check_identity(call, limits)
    _check_prompt_form(call, card, limits)
    options, defaults = call.sampling, card.defaults
    n = 1 if options.n is None else options.n
    _within("n", n, 1, limits.max_n)
    for name, limit in (("logprobs", limits.max_logprobs), ("prompt_logprobs", limits.max_prompt_logprobs)):
        value = getattr(options, name)
        if value is not None:
            _within(name, value, 0, limit)
    _check_stops(options, card, limits)
    _check_bias(options, card, limits)
    top_k = options.top_k if options.top_k is not None else (defaults.top_k or 0)
    if top_k < -1:
        raise InvalidRequest(f"top_k must be 0 or -1 (off) or positive, not {top_k}", field="top_k")
    max_tokens = options.max_tokens if options.max_tokens is not None else defaults.max_tokens
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {max_tokens}", field="max_tokens")
    seed = options.seed if options.seed is not None else defaults.seed
    resolved = Resolved(
        options=options,
        n=n,
        seed=secrets.randbits(63) if seed is None else seed,
        top_k=min(max(top_k, 0), card.vocab_size),
        max_tokens=max_tokens,
        stop=tuple(dict.fromkeys(options.stop or defaults.stop)),
        include_stop=bool(_pick(options.include_stop_str_in_output, defaults.include_stop_str_in_output, False)),
        skip_special_tokens=bool(_pick(options.skip_special_tokens, defaults.skip_special_tokens, True)),
    )
    _params(resolved, card, max_tokens=max_tokens or card.max_model_len)
    return resolved


def fit(resolved: Resolved, prompt_token_ids: Sequence[int], card: ModelCard, *, field: str) -> Prepared:
    """Checks the prompt's tokens, `field` in the client's words, and settles `max_tokens`."""
    length = len(prompt_token_ids)
    if not length:
        raise InvalidRequest(f"{field} is empty: at least one token is needed", field=field)
    room = card.max_model_len - length
    if room < 1:
        raise InvalidRequest(
            f"{field} has {length} tokens; the model's length is {card.max_model_len}, "
            "of which at least one is for the answer",
            field=field,
        )
    max_tokens = room if resolved.max_tokens is None else resolved.max_tokens
    if resolved.options.max_tokens is None:
        max_tokens = min(max_tokens, room)  # a default of the server's never makes a request fail
    elif max_tokens > room:
        raise InvalidRequest(
            f"max_tokens is {max_tokens}, but a prompt of {length} tokens leaves room for {room} "
            f"in the model's length of {card.max_model_len}",
            field="max_tokens",
        )
    return Prepared(
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=_params(resolved, card, max_tokens=max_tokens),
        n=resolved.n,
        stop=resolved.stop,
        include_stop=resolved.include_stop,
        skip_special_tokens=resolved.skip_special_tokens,
    )


def _params(resolved: Resolved, card: ModelCard, *, max_tokens: int) -> SamplingParams:
    options, defaults = resolved.options, card.defaults
    ignore_eos = bool(_pick(options.ignore_eos, defaults.ignore_eos, False))
    try:
        params = SamplingParams(
            temperature=_pick(options.temperature, defaults.temperature, 1.0),
            top_p=_pick(options.top_p, defaults.top_p, 1.0),
            top_k=resolved.top_k,
            min_p=_pick(options.min_p, defaults.min_p, 0.0),
            repetition_penalty=_pick(options.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=_pick(options.presence_penalty, defaults.presence_penalty, 0.0),
            frequency_penalty=_pick(options.frequency_penalty, defaults.frequency_penalty, 0.0),
            logit_bias=dict(options.logit_bias or defaults.logit_bias),
            seed=resolved.seed,
            stop_token_ids=frozenset(options.stop_token_ids or defaults.stop_token_ids),
            max_tokens=max_tokens,
            min_tokens=int(_pick(options.min_tokens, defaults.min_tokens, 0)),
            ignore_eos=ignore_eos,
            logprobs=options.logprobs,
            prompt_logprobs=options.prompt_logprobs,
            grammar=None if options.guided is None else options.guided.grammar,
        )
    except ValueError as error:
        message = str(error)
        raise InvalidRequest(message, field=message.split(" ", 1)[0]) from None
    for name in ("top_p", "repetition_penalty"):
        value = getattr(params, name)
        if c_float(value).value == 0.0:  # what is above 0 here must still be so in the engine's 32 bits
            raise InvalidRequest(f"{name} must be above 0 in 32 bits, not {value}", field=name)
    return params


def _check_identity(call: Call, limits: Limits) -> None:
    request_id = call.request_id
    if len(request_id) > limits.max_request_id_chars or not (request_id.isprintable() and request_id.isascii()):
        rule = f"printable ASCII of at most {limits.max_request_id_chars} characters"
        field = "idempotency_key" if call.idempotency_key else "request_id"
        raise InvalidRequest(f"{field} must be {rule}", field=field)
    _within("priority", call.priority, -limits.max_priority, limits.max_priority)


def _check_prompt_form(call: Call, card: ModelCard, limits: Limits) -> None:
    given = [name for name in ("text", "token_ids", "messages") if getattr(call, name) is not None]
    if len(given) != 1:
        raise InvalidRequest("exactly one of text, token_ids and messages must be given", field="prompt")
    if call.token_ids is not None:
        check_token_ids(call.token_ids, card.vocab_size, "token_ids")
    if call.messages is not None and not call.messages:
        raise InvalidRequest("messages is empty: at least one message is needed", field="messages")
    texts = [call.text] if call.text is not None else [message.content for message in call.messages or ()]
    num_chars = sum(map(len, texts))
    if num_chars > limits.max_prompt_chars:
        raise InvalidRequest(
            f"the prompt has {num_chars} characters; at most {limits.max_prompt_chars} are taken", field=given[0]
        )
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{given[0]} holds half a surrogate pair, which is no text", field=given[0]) from None


def _check_stops(options: SamplingOptions, card: ModelCard, limits: Limits) -> None:
    if len(options.stop) > limits.max_stop:
        raise InvalidRequest(f"stop has {len(options.stop)} strings; at most {limits.max_stop} are taken", field="stop")
    for at, stop in enumerate(options.stop):
        if not 1 <= len(stop) <= limits.max_stop_chars:
            rule = f"must have 1 to {limits.max_stop_chars} characters"
            raise InvalidRequest(f"stop[{at}] {rule}, not {len(stop)}", field="stop")
    if len(options.stop_token_ids) > limits.max_stop_token_ids:
        found = f"{len(options.stop_token_ids)} ids; at most {limits.max_stop_token_ids} are taken"
        raise InvalidRequest(f"stop_token_ids has {found}", field="stop_token_ids")
    check_token_ids(options.stop_token_ids, card.vocab_size, "stop_token_ids")


def _check_bias(options: SamplingOptions, card: ModelCard, limits: Limits) -> None:
    if len(options.logit_bias) > limits.max_logit_bias:
        found = f"{len(options.logit_bias)} entries; at most {limits.max_logit_bias} are taken"
        raise InvalidRequest(f"logit_bias has {found}", field="logit_bias")
    for token_id in options.logit_bias:
        if not 0 <= token_id < card.vocab_size:
            raise InvalidRequest(
                f"logit_bias names token {token_id}; token ids are 0 to {card.vocab_size - 1}", field="logit_bias"
            )


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, not {value}", field=name)


def _pick(asked: float | None, default: float | None, otherwise: float) -> float:
    return asked if asked is not None else default if default is not None else otherwise


def _short(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:61] + "...")
