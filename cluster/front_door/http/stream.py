"""Server-sent events: one for each chunk, written by hand where a chunk is only text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.front_door.call import Chunk, Usage
from cluster.front_door.http.connection import ClientGone, while_connected
from cluster.front_door.http.faults import error_body
from cluster.front_door.http.gather import add_usage, usage_object
from cluster.front_door.http.merge import Item
from cluster.front_door.http.schema import StreamOptions
from cluster.front_door.http.style import Envelope, Style, to_json

__all__ = ["EventStream", "Events", "Marks"]

_DONE = "data: [DONE]\n\n"
_END = "\n\n"  # of an event; JSON has no line feeds


class Marks:
    """Ids of events, by which a client can go on with a stream that broke: how many tokens of each choice it holds."""

    def __init__(self, num_choices: int, held: Sequence[int]) -> None:
        self._positions = [*held] if held else [0] * num_choices

    def on(self, events: str, chunk: Chunk) -> str:
        """The last of a chunk's events completes what it brings."""
        self._positions[chunk.index] = chunk.position + len(chunk.token_ids)
        before, separator, last = events.removesuffix(_END).rpartition(_END)
        return f"{before}{separator}id: {','.join(map(str, self._positions))}\n{last}{_END}"


class Events:
    """The events of one answer."""

    def __init__(
        self, envelope: Envelope, style: Style, options: StreamOptions | None, *, marks: Marks | None = None
    ) -> None:
        self._style = style
        self._marks = marks
        self._head = envelope.head(style)
        self._with_usage = options is not None and bool(options.include_usage)
        self._with_each_usage = self._with_usage and options is not None and bool(options.continuous_usage_stats)
        self._tail = '],"usage":null}\n\n' if self._with_usage else "]}\n\n"
        self._begun: set[tuple[int, int]] = set()
        self._num_prompt_tokens: dict[int, int] = {}
        self._num_tokens = 0
        self._usage = Usage(0, 0)

    def of(self, at: int, chunk: Chunk) -> str:
        """What a chunk is to the client."""
        events = self._of(at, chunk)
        return events if self._marks is None else self._marks.on(events, chunk)

    def _of(self, at: int, chunk: Chunk) -> str:
        key = (at, chunk.index)
        first = chunk.position == 0 and key not in self._begun
        if not first and not self._with_each_usage and (plain := self._style.plain(at, chunk)) is not None:
            return f"{self._head}{plain}{self._tail}"
        if chunk.usage is not None:
            self._usage = add_usage(self._usage, chunk.usage)
        extras = self._style.extras(chunk) if first and not self._begun else {}
        self._begun.add(key)
        tail = self._each_usage(at, chunk) if self._with_each_usage else self._tail
        if extras:
            tail = f"],{to_json(extras)[1:-1]}{tail[1:]}"
        parts = self._style.part(at, chunk, first=first)
        return "".join(f"{self._head}{to_json(part)}{tail}" for part in parts)

    def last(self) -> str:
        """What follows the last chunk."""
        if not self._with_usage:
            return _DONE
        return f'{self._head}],"usage":{to_json(usage_object(self._usage))}}}\n\n{_DONE}'

    def _each_usage(self, at: int, chunk: Chunk) -> str:
        """Usage so far, on every event."""
        if chunk.prompt_token_ids:
            self._num_prompt_tokens[at] = len(chunk.prompt_token_ids)
        self._num_tokens += len(chunk.token_ids)
        usage = Usage(sum(self._num_prompt_tokens.values()), self._num_tokens)
        return f'],"usage":{to_json(usage_object(usage))}}}\n\n'


class EventStream(Response):
    """Starts with the first chunk: what goes wrong before it is an HTTP error, what goes wrong after it an event.

    The stream is closed, and its work ends, as soon as the client is gone.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Item, None], events: Events) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._chunks) as chunks:
                async for at, chunk in chunks:
                    if not started:
                        started = True
                        await send(
                            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        )
                    event = self._events.of(at, chunk)
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            assert started, "a call ended without a chunk"
            tail = self._events.last()
        except Exception as error:
            if not started or isinstance(error, ClientGone):
                raise
            tail = f"data: {to_json(error_body(error)[1])}\n\n{_DONE}"
        await send({"type": "http.response.body", "body": tail.encode(), "more_body": False})
