"""Everything behind the wire that the doors share: a `Call` goes in, `Chunk`s come out.

    async with aclosing(desk.open(call)) as chunks:
        async for chunk in chunks:
            ...

Errors are `RequestError`s, and those about the call itself come before the first chunk. Closing the iterator, or
cancelling the task that reads it, ends all work for the call at once.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from opentelemetry import trace

from cluster.front_door.call import Call, Chunk, Guided, Message
from cluster.front_door.choice import Choice
from cluster.front_door.claims import Claims
from cluster.front_door.comeback import Comeback, Held
from cluster.front_door.dispatcher import Dispatcher
from cluster.front_door.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidRequest,
    RateLimited,
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
from cluster.front_door.origin import body_digest, empty_output, origin_of
from cluster.front_door.prompts import PromptEncoder
from cluster.front_door.quotas import Allowances, Quotas, Standing
from cluster.front_door.reading import Reading
from cluster.front_door.recent import Recent
from cluster.front_door.spans import RequestSpan
from cluster.front_door.submits import submit_of
from cluster.front_door.text import Template, TextCodec
from cluster.front_door.validate import Prepared, Resolved, check_model, check_token_ids, fit, resolve
from workers.guided import GrammarCompiler, GrammarError

__all__ = ["Desk"]

Key = tuple[str, str]  # the client and its request's id

# How long a request is waited for that groups may know to which there is no stream yet: where nothing else is known
# of it, and where the client has sent all of it.
_PATIENCE_S = 2.0
_PATIENCE_WITH_REQUEST_S = 0.5


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
        share_prefixes: bool = False,
        grammars: GrammarCompiler | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self.card = card
        self.codec = codec
        self.limits = limits
        self.metrics = metrics
        self._clock = clock
        self._links = links
        self._grammars = grammars
        self._allowances = Allowances(quotas or Quotas(), clock)
        self._tracer = tracer or trace.get_tracer("shoal.front_door")
        self._prompts = PromptEncoder(codec, template)
        self._dispatcher = Dispatcher(links, limits, clock, metrics, share_prefixes=share_prefixes)
        self._gate = Gate(limits, metrics, clock)
        self._recent = Recent(limits, clock)
        self._claims = Claims(links)
        self._comeback = Comeback(self._claims, codec, self._dispatcher, self._new)
        self._open: dict[Key, OpenRequest] = {}
        self._listeners: list[Callable[[], None]] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaving = self._closed = False
        links.on_change(self._changed)

    @property
    def num_open(self) -> int:
        """Calls that a client is waiting for."""
        return len(self._open)

    def ready(self) -> bool:
        """Whether a call would be taken and run now."""
        return self._links.ready and not self._leaving

    @property
    def leaving(self) -> bool:
        """Whether calls should come to another front door; those that still come here are answered."""
        return self._leaving

    def on_ready_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever `ready()` may have changed."""
        self._listeners.append(listener)

    def standings(self, tenant: str) -> dict[str, Standing]:
        """What is left of a tenant's limits: of "requests" and "tokens", where there are any."""
        return self._allowances.standings(tenant)

    def models(self) -> tuple[ModelCard, ...]:
        return (self.card,)

    async def open(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Runs a call. Raises RequestError; see the module's docstring."""
        if not call.request_id:
            call = replace(call, request_id=call.idempotency_key or uuid.uuid4().hex)
        digest = ""
        if call.idempotency_key:
            resolve(call, self.card, self.limits)
            digest = body_digest(call)
            key = (call.client, call.request_id)
            known = await self._find(key, call.held, must_exist=bool(call.held), door=call.door)
            if known is not None:
                _check_same(known, digest)
                async with aclosing(self._go_on(known, call.held, call)) as rest:
                    async for each in rest:
                        yield each
                return
            if call.held:
                raise RequestNotFound("no request of that key is known any more; send it anew", field="held")
        request = self._new(call)
        self._measure(request, call)
        request.body_digest = digest
        with Reading(request, self._left) as reading:
            request.begin(await self._choices(request, self._come_in(request)))
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
        held: Held | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Goes on with a call for a client that holds `positions[i]` tokens of choice i (empty: none of any).

        A call that is still being read, here or at another front door, is taken over. One that nobody remembers is
        gone on with by what the client brings along, `held`. Raises RequestNotFound where that is nothing.
        """
        self._check_open()
        asked = Call(request_id=request_id, client=client, timeout_s=timeout_s, door=door, traceparent=traceparent)
        request = await self._find((client, request_id), positions, must_exist=held is None, held=held, door=door)
        if request is None and held is not None:
            request = self._new(replace(held.call, request_id=request_id))
        if request is None:
            raise RequestNotFound("no request of that id is known any more; send it again", field="request_id")
        async with aclosing(self._go_on(request, positions, asked, held)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _find(
        self, key: Key, positions: Sequence[int], *, must_exist: bool, held: Held | None = None, door: str = ""
    ) -> OpenRequest | None:
        """A call that is open or was lately, here or elsewhere."""
        request = self._open.get(key)
        if request is not None:
            await request.begun.wait()
            return request if request.choices else None
        recent = self._recent.take(key)
        if recent is not None and recent.finished and _fits(recent, positions):
            return recent
        # It may have gone on elsewhere in between.
        patience_s = 0.0 if recent is not None else _PATIENCE_S if must_exist else _PATIENCE_WITH_REQUEST_S
        claimed = await self._comeback.claim(*key, held, patience_s=patience_s, door=door)
        # A faster call for the same may have found it, too.
        return self._open.get(key) or claimed or recent

    async def _go_on(
        self, request: OpenRequest, positions: Sequence[int], asked: Call, held: Held | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """What the client does not hold of a call that was begun before, or that it brings along."""
        if request.choices:
            try:
                rewound = _checked_positions(request, positions)
                deadline_s = self._deadline_s(asked.timeout_s)
                self._check_open()
                self._enter(request)
            except RequestError:
                if request.key not in self._open:
                    self._recent.keep(request)
                raise
        self._measure(request, replace(request.call, traceparent=asked.traceparent, door=asked.door))
        with Reading(request, self._left) as reading:
            if not request.choices:
                assert held is not None
                submits = [choice.submit for choice in await self._choices(request, self._come_in(request))]
                self._comeback.begin_with(request, submits, held)
                rewound, deadline_s = _checked_positions(request, positions), request.deadline_s
            request.expire_at(deadline_s)
            reader = reading.begin()
            request.rewind(rewound)
            while (chunk := await request.next_chunk(reader)) is not None:
                yield chunk

    def cancel(self, request_id: str, client: str = "") -> bool:
        """Ends a call of the same client; whether it was open. Its reader gets what there is, and the end."""
        request = self._open.get((client, request_id))
        if request is None:
            return False
        request.cancel()
        return True

    async def cancel_anywhere(self, request_id: str, client: str = "") -> bool:
        """The same for a call that any front door took in."""
        return self.cancel(request_id, client) or await self._claims.cancel(client, request_id)

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
        """Waits until no call is open, then takes no new one; those still open after `timeout_s` are ended.

        A call that comes meanwhile was sent before its client could know.
        """
        self._leaving = True
        self._changed()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            for request in list(self._open.values()):
                request.fail(Unavailable("the front door is shutting down", retry_after_s=1.0))
        finally:
            self._closed = True

    def close(self) -> None:
        self._prompts.close()
        if self._grammars is not None:
            self._grammars.close()

    def _new(self, call: Call) -> OpenRequest:
        return OpenRequest(call, dispatcher=self._dispatcher, clock=self._clock, min_gap_s=self.limits.min_chunk_gap_s)

    def _measure(self, request: OpenRequest, call: Call) -> None:
        """A reading begins."""
        request.span = RequestSpan(self._tracer, call, self.card.name)
        request.meter = self.metrics.open(call.door)

    def _come_in(self, request: OpenRequest) -> Resolved:
        """Whether a new call may: all that needs no tokenizer."""
        self._check_open()
        resolved = resolve(request.call, self.card, self.limits)
        if request.key in self._open:
            raise AlreadyExists("a request of that id is open", field="request_id")
        request.expire_at(self._deadline_s(request.call.timeout_s))
        if not self._links.ready and not self._dispatcher.worth_waiting:
            raise Unavailable("no engine is ready", retry_after_s=1.0)
        self._allowances.check(request.call.tenant)
        self._enter(request)
        self._allowances.count(request.call.tenant)
        return resolved

    async def _choices(self, request: OpenRequest, resolved: Resolved) -> tuple[Choice, ...]:
        """From a call to its sequences."""
        await self._check_grammar(request.call.sampling.guided)
        prompt, field = await self._prompts.encode_call(request.call)
        prepared = fit(resolved, prompt, self.card, field=field)
        cost_tokens = prepared.n * (len(prompt) + prepared.sampling.max_tokens)
        self._gate.weigh(request.call.priority, cost_tokens)
        self._allowances.spend(request.call.tenant, len(prompt))
        request.cost_tokens = cost_tokens
        request.raise_failure()
        request.span.prepared(prepared)
        opened_unix_ns = time.time_ns()
        return tuple(self._choice(request, prepared, index, opened_unix_ns) for index in range(prepared.n))

    async def _check_grammar(self, guided: Guided | None) -> None:
        """Compiles it as a rank will, so that a bad one is refused here."""
        if guided is None:
            return
        try:
            if self._grammars is None:
                raise GrammarError("cannot be followed: the model has no tokenizer.json")
            await self._grammars.compile(guided.grammar, self.codec.eos_token_ids)
        except GrammarError as error:
            raise InvalidRequest(f"{guided.field} {error}", field=guided.field) from None

    def _choice(self, request: OpenRequest, prepared: Prepared, index: int, opened_unix_ns: int) -> Choice:
        call = request.call
        submit = submit_of(
            call,
            prepared,
            index,
            eos_token_ids=self.codec.eos_token_ids,
            traceparent=request.span.traceparent,
            origin=origin_of(call, prepared, index, digest=request.body_digest, opened_unix_ns=opened_unix_ns),
        )
        output = empty_output(submit, self.codec, prepared.prompt_token_ids)
        return Choice(output, submit, request, self._dispatcher)

    def _enter(self, request: OpenRequest) -> None:
        """Counts the call among the open ones. Raises Overloaded."""
        if self._open.get(request.key) is request:
            return
        self._gate.enter(request.call.priority, request.cost_tokens)
        try:
            self._allowances.enter(request.call.tenant)
        except RateLimited:
            self._gate.leave(request.cost_tokens)
            raise
        self._open[request.key] = request
        self._idle.clear()

    def _left(self, request: OpenRequest) -> None:
        """Its reader is gone, one way or the other."""
        request.suspend()
        if self._open.get(request.key) is request:
            del self._open[request.key]
            self._gate.leave(request.cost_tokens)
            self._allowances.leave(request.call.tenant)
            made = sum(len(choice.output.token_ids) for choice in request.choices)
            self._allowances.spend(request.call.tenant, made - request.num_paid)
            request.num_paid = made
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

    def _check_open(self) -> None:
        if self._closed:
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


def _fits(request: OpenRequest, positions: Sequence[int]) -> bool:
    """Whether the client can have had these tokens from here."""
    return all(
        position <= len(choice.output.token_ids) for choice, position in zip(request.choices, positions, strict=False)
    )


def _check_same(request: OpenRequest, digest: str) -> None:
    if request.body_digest != digest:
        raise AlreadyExists(
            "this idempotency key came with another request; a new request needs a new key", field="idempotency_key"
        )
