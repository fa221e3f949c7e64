"""A call's prompt as token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.front_door.call import Call, Message
from cluster.front_door.errors import InvalidRequest
from cluster.front_door.text import Template, TextCodec

__all__ = ["PromptEncoder"]

# Shorter ones take less time than a thread's round trip is worth (well under a millisecond).
_INLINE_CHARS = 2048


class PromptEncoder:
    """Renders and tokenises; long prompts in a thread, so that no stream waits for them."""

    def __init__(self, codec: TextCodec, template: Template | None, *, num_threads: int = 2) -> None:
        self._codec = codec
        self._template = template
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    async def encode_call(self, call: Call) -> tuple[Sequence[int], str]:
        """The prompt's tokens, and the field that the client gave them in."""
        if call.token_ids is not None:
            return call.token_ids, "token_ids"
        if call.messages is not None:
            ids = await self.encode_messages(
                call.messages, add_generation_prompt=call.add_generation_prompt, kwargs=call.chat_template_kwargs
            )
            return ids, "messages"
        assert call.text is not None
        return await self.encode_text(call.text, add_special_tokens=True), "text"

    async def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises InvalidRequest for text that cannot be tokenised."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, text, add_special_tokens)

    async def encode_messages(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, kwargs: Mapping[str, object]
    ) -> list[int]:
        """Raises InvalidRequest where the model has no template, or the messages do not fit it."""
        if sum(len(message.content) for message in messages) <= _INLINE_CHARS:
            return self._encode_messages(messages, add_generation_prompt, kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_messages, messages, add_generation_prompt, kwargs)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._codec.encode(text, add_special_tokens)
        except ValueError as error:
            raise InvalidRequest(str(error), field="text") from None

    def _encode_messages(
        self, messages: Sequence[Message], add_generation_prompt: bool, kwargs: Mapping[str, object]
    ) -> list[int]:
        if self._template is None:
            raise InvalidRequest("the model has no chat template; use a plain prompt", field="messages")
        try:
            text = self._template.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
            return self._codec.encode(text, False)  # a template writes its own special tokens
        except ValueError as error:
            raise InvalidRequest(str(error), field="messages") from None
