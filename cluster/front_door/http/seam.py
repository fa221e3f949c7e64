"""What this door asks of the rest of the front door."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.front_door.call import Call, Chunk, Message
from cluster.front_door.limits import Limits
from cluster.front_door.model_card import ModelCard
from cluster.front_door.quotas import Standing
from cluster.front_door.text import TextCodec

__all__ = ["DeskLike", "HttpLimits"]


class DeskLike(Protocol):
    """The part of `cluster.front_door.desk.Desk` that is used here."""

    @property
    def codec(self) -> TextCodec: ...

    @property
    def limits(self) -> Limits: ...

    def open(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Validation errors come before the first chunk; closing the iterator ends the work."""
        ...

    def models(self) -> Sequence[ModelCard]: ...

    def ready(self) -> bool: ...

    def standings(self, tenant: str) -> dict[str, Standing]: ...

    async def tokenize(
        self,
        *,
        model: str = "",
        text: str | None = None,
        messages: Sequence[Message] | None = None,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]: ...

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = False
    ) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpLimits:
    """Checked before any work is done for a request."""

    max_body_bytes: int = 32 * 1024 * 1024
    max_prompts: int = 256  # in one request
    max_choices: int = 1024  # of all its prompts together
