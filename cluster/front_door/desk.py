"""Everything behind the wire that the doors share: a `Call` goes in, `Chunk`s come out.

    async with aclosing(desk.open(call)) as chunks:
        async for chunk in chunks:
            ...

Errors are `RequestError`s, and those about the call itself come before the first chunk. Closing the iterator, or
cancelling the task that reads it, ends all work for the call at once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace

from opentelemetry import trace

from cluster.front_door.call import Call, Chunk, Message
from cluster.front_door.choice import Choice
from cluster.front_door.dispatcher import Dispatcher
from cluster.front_door.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidRequest,
    RequestError,
    RequestNotFound,
    Unavailable,
)
from cluster.front_door.gate import Gate
from cluster.front_door.groups import Clock
from cluster.front_door.limits import Limits
from cluster.front_door.links import Links
from cluster.front_door.metrics import FrontDoorMetrics
from cluster.front_door.model_card import ModelCard
from cluster.front_door.open_request import OpenRequest
from cluster.front_door.output import ChoiceOutput
from cluster.front_door.prompts import PromptEncoder
from cluster.front_door.reading import Reading
from cluster.front_door.recent import Recent
from cluster.front_door.spans import RequestSpan
from cluster.front_door.stops import StopScanner
from cluster.front_door.submits import submit_of
from cluster.front_door.text import Template, TextCodec
from cluster.front_door.validate import Prepared, check_model, check_token_ids, fit, resolve

__all__ = ["Desk"]


class Desk:
    """One per front door; belongs to the event loop."""

    def __init__(
        self,
        *,
        card: ModelCard,
        codec: TextCodec,
        template: Template | None,
        links: Links,
        limits: Limits,
        metrics: FrontDoorMetrics,
        clock: Clock,
        tracer: trace.Tracer | None = None,
    ) -> None:
        self.card = card
        self.codec = codec
        self.limits = limits
        self.metrics = metrics
        self._clock = clock
        self._links = links
        self._tracer = tracer or trace.get_tracer("shoal.front_door")
        self._prompts = PromptEncoder(codec, template)
        self._dispatcher = Dispatcher(links, limits, clock, metrics)
        self._gate = Gate(limits, metrics, clock)
        self._recent = Recent(limits, clock)
        self._open: dict[tuple[str, str], OpenRequest] = {}
        self._listeners: list[Callable[[], None]] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        links.on_change(self._changed)

    @property
    def num_open(self) -> int:
        """Calls that a client is waiting for."""
        return len(self._open)

    def ready(self) -> bool:
        """Whether a call would be taken and run now."""
        return self._links.ready and not self._draining

    def on_ready_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever `ready()` may have changed."""
        self._listeners.append(listener)

    def models(self) -> tuple[ModelCard, ...]:
        return (self.card,)

    async def open(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Runs a call. Raises RequestError; see the module's docstring."""
        if not call.request_id:
            call = replace(call, request_id=uuid.uuid4().hex)
        span = RequestSpan(self._tracer, call, self.card.name)
        meter = self.metrics.open(call.door)
        request = OpenRequest(call, dispatcher=self._dispatcher, clock=self._clock, meter=meter, span=span)
        with Reading(request, self._left) as reading:
            await self._begin(request)
            reader = reading.begin()
            while (chunk := await request.next_chunk(reader)) is not None:
                yield chunk

    async def resume(
        self,
        request_id: str,
        positions: Sequence[int],
        *,
        client: str = "",
        timeout_s: float | None = None,
        door: str = "",
        traceparent: str = "",
    ) -> AsyncGenerator[Chunk, None]:
        """Goes on with a call for a client that holds `positions[i]` tokens of choice i (empty: none of any).

        A call that is still being read is taken over. Raises RequestNotFound where this front door does not know
        the call, or no longer.
        """
        key = (client, request_id)
        request = self._open.get(key) or self._recent.take(key)
        if request is None or not request.choices:
            raise RequestNotFound(
                "this front door does not hold that request; send it again, or resume it where it was begun",
                field="request_id",
            )
        try:
            held = _checked_positions(request, positions)
            deadline_s = self._deadline_s(timeout_s)
            self._check_draining()
            self._enter(request)
        except RequestError:
            if key not in self._open:
                self._recent.keep(request)
            raise
        call = replace(request.call, traceparent=traceparent, door=door)
        request.span = RequestSpan(self._tracer, call, self.card.name)
        request.meter = self.metrics.open(door)
        with Reading(request, self._left) as reading:
            request.expire_at(deadline_s)
            reader = reading.begin()
            request.rewind(held)
            while (chunk := await request.next_chunk(reader)) is not None:
                yield chunk

    def cancel(self, request_id: str, client: str = "") -> bool:
        """Ends a call of the same client; whether it was open. Its reader gets what there is, and the end."""
        request = self._open.get((client, request_id))
        if request is None:
            return False
        request.cancel()
        return True

    async def tokenize(
        self,
        *,
        model: str = "",
        text: str | None = None,
        messages: Sequence[Message] | None = None,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The token ids of a text, or of messages in the model's chat template."""
        check_model(model, self.card)
        if (text is None) == (messages is None):
            raise InvalidRequest("exactly one of text and messages must be given", field="input")
        num_chars = len(text or "") + sum(len(message.content) for message in messages or ())
        if num_chars > self.limits.max_prompt_chars:
            found = f"the input has {num_chars} characters; at most {self.limits.max_prompt_chars} are taken"
            raise InvalidRequest(found, field="text" if messages is None else "messages")
        if messages is None:
            return await self._prompts.encode_text(text or "", add_special_tokens=add_special_tokens)
        return await self._prompts.encode_messages(
            messages, add_generation_prompt=add_generation_prompt, kwargs=chat_template_kwargs or {}
        )

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        check_model(model, self.card)
        check_token_ids(token_ids, self.card.vocab_size, "token_ids")
        return await asyncio.to_thread(self.codec.decode, list(token_ids), skip_special_tokens)

    async def drain(self, timeout_s: float) -> None:
        """Takes no new call, and waits for the open ones; those still open after `timeout_s` are ended."""
        self._draining = True
        self._changed()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            for request in list(self._open.values()):
                request.fail(Unavailable("the front door is shutting down", retry_after_s=1.0))

    def close(self) -> None:
        self._prompts.close()

    async def _begin(self, request: OpenRequest) -> None:
        """From a call to sequences in DP groups."""
        call = request.call
        self._check_draining()
        resolved = resolve(call, self.card, self.limits)
        if request.key in self._open:
            raise AlreadyExists("a request of that id is open", field="request_id")
        request.expire_at(self._deadline_s(call.timeout_s))
        if not self._links.ready and not self._dispatcher.worth_waiting:
            raise Unavailable("no engine is ready", retry_after_s=1.0)
        self._enter(request)
        prompt, field = await self._prompts.encode_call(call)
        prepared = fit(resolved, prompt, self.card, field=field)
        cost_tokens = prepared.n * (len(prompt) + prepared.sampling.max_tokens)
        self._gate.weigh(cost_tokens)
        request.cost_tokens = cost_tokens
        request.raise_failure()
        request.span.prepared(prepared)
        request.begin(tuple(self._choice(request, prepared, index) for index in range(prepared.n)))

    def _choice(self, request: OpenRequest, prepared: Prepared, index: int) -> Choice:
        stops = StopScanner(prepared.stop, include_in_output=prepared.include_stop) if prepared.stop else None
        output = ChoiceOutput(
            index,
            text=self.codec.detokenizer(prepared.skip_special_tokens, continues=request.call.messages is None),
            stops=stops,
            min_tokens=prepared.sampling.min_tokens,
            include_stop=prepared.include_stop,
            prompt_token_ids=prepared.prompt_token_ids,
        )
        submit = submit_of(
            request.call,
            prepared,
            index,
            eos_token_ids=self.codec.eos_token_ids,
            traceparent=request.span.traceparent,
        )
        return Choice(output, submit, request, self._dispatcher)

    def _enter(self, request: OpenRequest) -> None:
        """Counts the call among the open ones. Raises Overloaded."""
        if self._open.get(request.key) is request:
            return
        self._gate.enter(request.cost_tokens)
        self._open[request.key] = request
        self._idle.clear()

    def _left(self, request: OpenRequest) -> None:
        """Its reader is gone, one way or the other."""
        request.suspend()
        if self._open.get(request.key) is request:
            del self._open[request.key]
            self._gate.leave(request.cost_tokens)
            if request.choices:
                self._recent.keep(request)
        if not self._open:
            self._idle.set()

    def _deadline_s(self, timeout_s: float | None) -> float | None:
        if timeout_s is None:
            return None
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed on arrival")
        return self._clock.time() + timeout_s

    def _check_draining(self) -> None:
        if self._draining:
            raise Unavailable("the front door is shutting down", retry_after_s=1.0)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _checked_positions(request: OpenRequest, positions: Sequence[int]) -> tuple[int, ...]:
    choices = request.choices
    if not positions:
        return (0,) * len(choices)
    if len(positions) != len(choices):
        found = f"{len(positions)} are given"
        raise InvalidRequest(f"positions must name each of the {len(choices)} choices; {found}", field="positions")
    for at, (choice, position) in enumerate(zip(choices, positions, strict=True)):
        num_tokens = len(choice.output.token_ids)
        if not 0 <= position <= num_tokens:
            found = f"choice {at} has had {num_tokens} tokens so far, not {position}"
            raise InvalidRequest(found, field="positions")
    return tuple(positions)
