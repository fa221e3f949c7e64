"""Every parameter that the `openai` client can send is served, ignored or refused by name: none is unknown."""

from __future__ import annotations

import pytest
from openai.types import chat as chat_types
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import BaseModel

from cluster.front_door.http.schema import ChatBody, CompletionBody, MessageBody, StreamOptions


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (completion_create_params.CompletionCreateParamsBase, CompletionBody),
        (chat_create_params.CompletionCreateParamsBase, ChatBody),
        (chat_types.ChatCompletionStreamOptionsParam, StreamOptions),
        (chat_types.ChatCompletionDeveloperMessageParam, MessageBody),
        (chat_types.ChatCompletionSystemMessageParam, MessageBody),
        (chat_types.ChatCompletionUserMessageParam, MessageBody),
        (chat_types.ChatCompletionAssistantMessageParam, MessageBody),
        (chat_types.ChatCompletionToolMessageParam, MessageBody),
    ],
)
def test_no_parameter_of_the_openai_client_is_unknown(theirs: type, ours: type[BaseModel]) -> None:
    assert theirs.__annotations__
    assert theirs.__annotations__.keys() <= ours.model_fields.keys()
