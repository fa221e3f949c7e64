"""Request bodies, field by field.

Strict: a number is no string, an unknown field is an error. Fields that OpenAI or vLLM know and this server does not
serve yet are listed with the values that ask for nothing; any other value is refused by name, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

__all__ = [
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "JsonSchemaBody",
    "MessageBody",
    "ResponseFormat",
    "StreamOptions",
    "StructuredOutputs",
    "TokenizeBody",
]


def _only(*harmless: object) -> AfterValidator:
    """For a field that is not served: takes the values that mean what happens anyway."""

    def check(value: object) -> object:
        if any(value == each and type(value) is type(each) for each in (None, *harmless)):
            return value
        raise PydanticCustomError("unsupported", "is not supported yet")

    return AfterValidator(check)


def _texts(value: object) -> object:
    texts = (value,) if isinstance(value, str) else value
    if texts is None or (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
        return None if texts is None else tuple(texts)
    raise PydanticCustomError("texts", "must be a string or a list of strings")


def _prompt(value: object) -> object:
    """Every form becomes a tuple of prompts, each a text or a tuple of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if _is_ids(value):
            return (tuple(value),)
        if all(isinstance(each, str) or (isinstance(each, list) and _is_ids(each)) for each in value):
            return tuple(each if isinstance(each, str) else tuple(each) for each in value)
    raise PydanticCustomError(
        "prompt", "must be a string, a list of token ids, a list of strings or a list of lists of token ids"
    )


def _is_ids(value: list[object]) -> bool:
    return all(type(each) is int for each in value)


def _content(value: object) -> object:
    """A string, or text parts, which are joined by line breaks."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of content parts")
    texts = []
    for at, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise PydanticCustomError(
                "unsupported", "[{at}] has type {kind}, which is not supported yet", {"at": at, "kind": repr(kind)[:40]}
            )
        if kind is None or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content", '[{at}] must be {"type": "text", "text": "..."}', {"at": at})
        texts.append(part["text"])
    return "\n".join(texts)


def _json_schema(value: object) -> object:
    """An object, or the text of one."""
    if value is None or isinstance(value, dict | str):
        return value
    raise PydanticCustomError("content", "must be a JSON schema: an object, or the text of one")


Ignored = Annotated[Any, Field(exclude=True)]
"""Says something about the request that changes nothing in its answer."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class JsonSchemaBody(_Body):
    name: str | None = None
    description: Ignored = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Ignored = None  # every schema is kept to


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None


class StructuredOutputs(_Body):
    """vLLM's: one of the first five."""

    json_: Annotated[Any, AfterValidator(_json_schema), Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: Ignored = None  # there is none but what whitespace_pattern asks for
    disable_fallback: Ignored = None
    disable_additional_properties: Annotated[Any, _only(False)] = None
    structural_tag: Annotated[Any, _only()] = None


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, _only(False)] = None


class _Generation(_Body):
    """What both endpoints share."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: Annotated[Any, AfterValidator(_texts)] = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Extensions, as vLLM names them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    priority: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None

    # What the output must match: one of these. The guided ones are what vLLM called structured_outputs before.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[Any, AfterValidator(_json_schema)] = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    # An extension of ours: seconds that the client is willing to wait for the whole answer.
    timeout: Annotated[float, Field(gt=0)] | None = None

    user: Ignored = None
    metadata: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    spaces_between_special_tokens: Ignored = None

    store: Annotated[Any, _only(False)] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    use_beam_search: Annotated[Any, _only(False)] = None
    length_penalty: Annotated[Any, _only(1, 1.0)] = None
    early_stopping: Annotated[Any, _only(False)] = None
    bad_words: Annotated[Any, _only([])] = None
    allowed_token_ids: Annotated[Any, _only()] = None
    truncate_prompt_tokens: Annotated[Any, _only()] = None
    guided_decoding_backend: Annotated[Any, _only("auto", "guidance")] = None
    logits_processors: Annotated[Any, _only([])] = None
    kv_transfer_params: Annotated[Any, _only()] = None


class CompletionBody(_Generation):
    prompt: Annotated[Any, AfterValidator(_prompt)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Annotated[Any, _only("")] = None
    add_special_tokens: Annotated[Any, _only(True)] = None


class MessageBody(_Body):
    role: Annotated[str, Field(min_length=1)]
    content: Annotated[Any, AfterValidator(_content)] = ""
    name: str | None = None
    # What OpenAI's clients put into an assistant's message when they send it back.
    refusal: Annotated[Any, _only("")] = None
    annotations: Annotated[Any, _only([])] = None
    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None
    tool_call_id: Annotated[Any, _only()] = None
    reasoning_content: Annotated[Any, _only("")] = None
    reasoning: Annotated[Any, _only("")] = None


class ChatBody(_Generation):
    messages: list[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    parallel_tool_calls: Ignored = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Annotated[Any, _only()] = None
    prediction: Annotated[Any, _only()] = None
    web_search_options: Annotated[Any, _only()] = None
    moderation: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only()] = None
    verbosity: Annotated[Any, _only()] = None
    echo: Annotated[Any, _only(False)] = None
    continue_final_message: Annotated[Any, _only(False)] = None
    add_special_tokens: Annotated[Any, _only(False)] = None
    chat_template: Annotated[Any, _only()] = None
    documents: Annotated[Any, _only([])] = None


class TokenizeBody(_Body):
    """Exactly one of `prompt` and `messages`."""

    model: str = ""
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    continue_final_message: Annotated[Any, _only(False)] = None


class DetokenizeBody(_Body):
    model: str = ""
    tokens: list[int]
