"""What the desk asks of a model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.front_door.call import Message

__all__ = ["IncrementalText", "Template", "TextCodec"]


class IncrementalText(Protocol):
    """Text of one output stream; never half a character."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty in the middle of a character."""
        ...

    def finish(self) -> str:
        """What is left when no token follows."""
        ...


class TextCodec(Protocol):
    """A tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def detokenizer(self, skip_special_tokens: bool, *, continues: bool = False) -> IncrementalText:
        """For one output stream; `continues` where it goes on behind a text, so that a leading space is meant."""
        ...


class Template(Protocol):
    """A chat template."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **kwargs: object) -> str:
        """The prompt's text; raises ValueError where the messages do not fit the template."""
        ...
