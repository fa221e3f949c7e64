"""/v1/completions: how its choices look."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from cluster.front_door.call import Call, Chunk
from cluster.front_door.http.gather import finish_name, stop_reason
from cluster.front_door.http.logprobs import LegacyLogprobs, Spelling, joined, prompt_logprobs
from cluster.front_door.http.merge import Item
from cluster.front_door.http.schema import CompletionBody
from cluster.front_door.http.style import ids_to_json, quoted
from cluster.front_door.text import TextCodec
from scheduler.plan import FinishReason

__all__ = ["CompletionStyle", "without_output"]


class CompletionStyle:
    """A `Style`."""

    kind = "text_completion"
    event_kind = "text_completion"

    def __init__(self, body: CompletionBody, calls: tuple[Call, ...], codec: TextCodec) -> None:
        self._body = body
        self._n = body.n or 1
        self._codec = codec
        self._skip = body.skip_special_tokens is not False
        self._spelling = Spelling(codec, as_ids=bool(body.return_tokens_as_token_ids))
        self._logprobs: dict[int, LegacyLogprobs] = {}
        self._echoes = [self._prompt_text(call) for call in calls] if body.echo else []
        self._is_plain = body.logprobs is None

    def whole(self, at: int, chunk: Chunk) -> dict[str, object]:
        return self._choice(at, chunk, first=True)

    def part(self, at: int, chunk: Chunk, *, first: bool) -> list[dict[str, object]]:
        return [self._choice(at, chunk, first=first)]

    def plain(self, at: int, chunk: Chunk) -> str | None:
        if not self._is_plain or chunk.finish is not None:
            return None
        text = quoted(chunk.text)
        index = at * self._n + chunk.index
        ids = f',"token_ids":{ids_to_json(chunk.token_ids)}' if self._body.return_token_ids else ""
        return f'{{"index":{index},"text":{text},"logprobs":null,"finish_reason":null,"stop_reason":null{ids}}}'

    def extras(self, chunk: Chunk) -> dict[str, object]:
        return {}

    def _choice(self, at: int, chunk: Chunk, *, first: bool) -> dict[str, object]:
        index = at * self._n + chunk.index
        text = chunk.text
        if first and self._body.echo:
            text = self._echoes[at] + text
        choice: dict[str, object] = {
            "index": index,
            "text": text,
            "logprobs": None if self._body.logprobs is None else self._render_logprobs(index, chunk, first=first),
            "finish_reason": finish_name(chunk.finish),
            "stop_reason": stop_reason(chunk),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(chunk.token_ids)
            if first:
                choice["prompt_token_ids"] = list(chunk.prompt_token_ids)
        if first and self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._spelling, chunk.prompt_logprobs)
        return choice

    def _render_logprobs(self, index: int, chunk: Chunk, *, first: bool) -> dict[str, object]:
        num_top = self._body.logprobs or 0
        of_choice = self._logprobs.get(index)
        if of_choice is None:
            text = self._codec.detokenizer(self._skip, continues=not self._body.echo)
            of_choice = LegacyLogprobs(text, self._spelling, num_top=num_top)
            self._logprobs[index] = of_choice
        if not (first and self._body.echo):
            return of_choice.render(chunk.token_ids, chunk.logprobs)
        prompt = of_choice.render(chunk.prompt_token_ids, chunk.prompt_logprobs)
        return joined(prompt, of_choice.render(chunk.token_ids, chunk.logprobs))

    def _prompt_text(self, call: Call) -> str:
        return call.text if call.text is not None else self._codec.decode(call.token_ids or (), self._skip)


async def without_output(stream: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """The stream of a request that `scores_only`: its chunks without the token that had to be made."""
    async with aclosing(stream) as chunks:
        async for at, chunk in chunks:
            yield (
                at,
                replace(
                    chunk,
                    text="",
                    token_ids=(),
                    logprobs=(),
                    finish=None if chunk.finish is None else FinishReason.LENGTH,
                    stop_string=None,
                    stop_token_id=None,
                    usage=None if chunk.usage is None else replace(chunk.usage, completion_tokens=0),
                ),
            )
