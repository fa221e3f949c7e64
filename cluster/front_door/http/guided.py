"""What a request body says its output must match: in OpenAI's `response_format`, or in vLLM's own fields."""

from __future__ import annotations

import json
from collections.abc import Iterator

from cluster.front_door.call import Guided
from cluster.front_door.errors import InvalidRequest
from cluster.front_door.http.schema import ChatBody, CompletionBody, ResponseFormat, StructuredOutputs
from scheduler.request import Grammar, GrammarKind

__all__ = ["guided_of"]

_Asked = tuple[GrammarKind, str, str]
"""A grammar's kind, its text, and the field."""


def guided_of(body: ChatBody | CompletionBody) -> Guided | None:
    """Raises InvalidRequest where more than one is asked for, or half of one."""
    outputs = body.structured_outputs
    whitespace, pattern_field = body.guided_whitespace_pattern, "guided_whitespace_pattern"
    if outputs is not None and outputs.whitespace_pattern is not None:
        whitespace, pattern_field = outputs.whitespace_pattern, "structured_outputs.whitespace_pattern"
    asked = [*_of_format(body.response_format), *_of_outputs(outputs), *_of_fields(body)]
    if len(asked) > 1:
        fields = [field for _, _, field in asked]
        raise InvalidRequest(f"{fields[1]} is given beside {fields[0]}; send one of them", field=fields[1])
    if not asked:
        if outputs is not None:
            rule = "must name one of json, json_object, regex, choice and grammar"
            raise InvalidRequest(f"structured_outputs {rule}", field="structured_outputs")
        if whitespace is not None:
            raise InvalidRequest(f"{pattern_field} needs guided_json", field=pattern_field)
        return None
    kind, text, field = asked[0]
    return Guided(Grammar(kind=kind, text=text, whitespace=whitespace), field)


def _of_format(given: ResponseFormat | None) -> Iterator[_Asked]:
    if given is None:
        return
    if given.type == "json_schema":
        if given.json_schema is None or given.json_schema.schema_ is None:
            field = "response_format.json_schema.schema"
            raise InvalidRequest(f"{field} is required where the type is json_schema", field=field)
        yield GrammarKind.JSON_SCHEMA, json.dumps(given.json_schema.schema_), "response_format.json_schema.schema"
    elif given.type == "json_object":
        yield GrammarKind.JSON_OBJECT, "", "response_format"


def _of_outputs(given: StructuredOutputs | None) -> Iterator[_Asked]:
    if given is None:
        return
    if given.json_ is not None:
        yield GrammarKind.JSON_SCHEMA, _schema(given.json_), "structured_outputs.json"
    if given.json_object:
        yield GrammarKind.JSON_OBJECT, "", "structured_outputs.json_object"
    if given.regex is not None:
        yield GrammarKind.REGEX, given.regex, "structured_outputs.regex"
    if given.choice is not None:
        yield GrammarKind.CHOICE, json.dumps(given.choice), "structured_outputs.choice"
    if given.grammar is not None:
        yield GrammarKind.RULES, given.grammar, "structured_outputs.grammar"


def _of_fields(body: ChatBody | CompletionBody) -> Iterator[_Asked]:
    if body.guided_json is not None:
        yield GrammarKind.JSON_SCHEMA, _schema(body.guided_json), "guided_json"
    if body.guided_regex is not None:
        yield GrammarKind.REGEX, body.guided_regex, "guided_regex"
    if body.guided_choice is not None:
        yield GrammarKind.CHOICE, json.dumps(body.guided_choice), "guided_choice"
    if body.guided_grammar is not None:
        yield GrammarKind.RULES, body.guided_grammar, "guided_grammar"


def _schema(given: object) -> str:
    return given if isinstance(given, str) else json.dumps(given)
