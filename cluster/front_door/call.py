"""One client call in the form both doors share, and what comes back.

A door parses its wire into a `Call`, hands it to `Desk.open`, and writes each `Chunk` back to its wire. Whatever a
value means, is checked against, or costs, is decided behind this line, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduler.plan import FinishReason, TokenLogprobs
from scheduler.request import Grammar

__all__ = ["Call", "Chunk", "Guided", "Message", "SamplingOptions", "Usage"]


@dataclass(frozen=True, slots=True)
class Guided:
    """What the whole output must match, and the field in which the client said so."""

    grammar: Grammar
    field: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """What the client asked for; None takes the server's default. Not yet checked against any limit."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    guided: Guided | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One generation asked for by a client. Exactly one of `text`, `token_ids` and `messages` is set.

    `timeout_s` is what was left of the client's deadline on arrival. `client` is who asked (the key's name, or
    empty without authentication): only the same client may cancel or resume the call. `held` is how many tokens of
    each choice the client has of an earlier call with the same `idempotency_key`.
    """

    model: str = ""
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    request_id: str = ""
    idempotency_key: str = ""
    held: tuple[int, ...] = ()
    priority: int = 0
    tenant: str = ""
    client: str = ""
    timeout_s: float | None = None
    traceparent: str = ""
    door: str = ""  # "grpc" or "http", for metrics


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole call."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """New output of one choice.

    `position` is the output position of `token_ids[0]`. `text` may lag behind `token_ids`: half characters and
    possible stop strings are held back until they are decided. `finish` is STOP, LENGTH or CANCELLED; every other
    end is raised as an error. `usage` comes with the last chunk of the whole call, `prompt_token_ids` and
    `prompt_logprobs` (whose entry 0 is None) with the first of each choice.
    """

    index: int
    position: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    usage: Usage | None = None
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
