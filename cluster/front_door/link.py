"""The stream to one DP group: submits and cancels up, one message of new tokens per step down.

A link connects again for as long as its group is in the roster. It is ready from the group's first message until the
stream breaks. Whoever has a sequence on a stream that breaks is told so at once, and can replay it elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from cluster.front_door.groups import GroupAddress, Sink
from protos.shoal.v1 import session_pb2, session_pb2_grpc
from scheduler.routing import GroupView

__all__ = ["Link", "LinkCounts", "LinkOptions"]

log = logging.getLogger(__name__)

# A sequence that answers weighs this many tokens at most when groups are compared: how long it will run is unknown.
_EXPECTED_TOKENS = 128

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # for a frozen process, whose kernel answers; a minute unless set
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # What a connection may take. The kernel itself asks again after 1, 3 and 7 s, so that a host which is back would
    # be found seconds later.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)

_Connect = grpc.aio.StreamStreamCall[session_pb2.Uplink, session_pb2.Downlink]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkOptions:
    """The same for all links of a front door."""

    front_door_id: str
    secret: str
    first_backoff_s: float = 0.05
    most_backoff_s: float = 0.5
    hello_timeout_s: float = 5.0


@dataclass(slots=True)
class LinkCounts:
    """Sequences so far; they only rise."""

    num_begun: int = 0
    num_failed: int = 0
    num_first_tokens: int = 0
    first_tokens_s: float = 0.0  # all of them together, from submit to first token


@dataclass(slots=True)
class _Open:
    """A sequence on the stream, and what it still weighs."""

    sink: Sink
    prompt_tokens: int
    answer_tokens: int
    begun_s: float


class _Stale(Exception):
    """The group speaks for a generation that is over."""


class Link:
    """One DP group. All methods belong to the event loop; `on_change` is called when readiness changes."""

    def __init__(self, address: GroupAddress, options: LinkOptions, on_change: Callable[[], None]) -> None:
        self.address = address
        self.info = session_pb2.GroupInfo()
        self.load = session_pb2.Load()
        self.generation = address.generation
        self.ready = False
        self.retiring = False
        self.num_lost = 0  # streams that broke after they were ready
        self._options = options
        self._on_change = on_change
        self.counts = LinkCounts()
        self._ids = itertools.count(1)
        self._open: dict[int, _Open] = {}
        self._claims: dict[int, asyncio.Future[Sequence[session_pb2.SequenceRecord]]] = {}
        self._outstanding_tokens = 0
        self._uplinks: deque[session_pb2.Uplink] = deque()
        self._wake = asyncio.Event()
        self._call: _Connect | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def outstanding_tokens(self) -> int:
        return self._outstanding_tokens

    def start(self) -> None:
        """Begins to connect."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"link {self.address.key}")

    async def close(self) -> None:
        """Ends the stream; open sequences are lost."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def view(self) -> GroupView:
        """What a routing policy sees."""
        load = self.load
        return GroupView(
            key=self.address.key,
            engine=self.address.engine,
            healthy=self.ready and not self.retiring,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_waiting_tokens=load.num_waiting_tokens,
            num_free_blocks=load.num_free_blocks,
            num_blocks=load.num_blocks,
            outstanding_tokens=self._outstanding_tokens,
            num_outstanding=len(self._open),
            max_batch_tokens=self.info.max_batch_tokens,
        )

    def give_up(self, reason: str) -> None:
        """Waits for nothing any more: what is open is lost at once, and `close` is to follow."""
        self._lose(reason)

    def fence(self, generation: int) -> None:
        """Refuse what the group says for an older generation than this."""
        self.generation = max(self.generation, generation)

    def submit(self, submit: session_pb2.Submit, sink: Sink) -> int:
        """Sends a sequence; returns its id, which `submit` gets too."""
        assert self.ready
        sequence_id = submit.sequence_id = next(self._ids)
        prompt = len(submit.prompt_token_ids) + len(submit.output_token_ids)
        answer = min(_EXPECTED_TOKENS, submit.sampling.max_tokens - len(submit.output_token_ids))
        self._open[sequence_id] = _Open(sink, prompt, answer, time.monotonic())
        self.counts.num_begun += 1
        self._outstanding_tokens += prompt + answer
        self._send(session_pb2.Uplink(submit=submit))
        return sequence_id

    def cancel(self, sequence_id: int, *, keep: bool = False) -> None:
        """Ends a sequence: nothing of it is delivered any more. `keep`: for a while it may be claimed."""
        if self._forget(sequence_id) is not None:
            self._send(session_pb2.Uplink(cancel=session_pb2.Cancel(sequence_id=sequence_id, keep=keep)))

    async def claim(
        self, client: str, request_id: str, *, cancel: bool = False
    ) -> Sequence[session_pb2.SequenceRecord]:
        """Takes a request from the front door that has it; nothing where the group knows none, or is lost."""
        claim = session_pb2.Claim(claim_id=next(self._ids), client=client, request_id=request_id, cancel=cancel)
        answer: asyncio.Future[Sequence[session_pb2.SequenceRecord]] = asyncio.get_running_loop().create_future()
        self._claims[claim.claim_id] = answer
        self._send(session_pb2.Uplink(claim=claim))
        try:
            return await answer
        finally:
            del self._claims[claim.claim_id]

    def _send(self, uplink: session_pb2.Uplink) -> None:
        self._uplinks.append(uplink)
        self._wake.set()

    def _forget(self, sequence_id: int) -> _Open | None:
        entry = self._open.pop(sequence_id, None)
        if entry is not None:
            self._outstanding_tokens -= entry.prompt_tokens + entry.answer_tokens
            if self.retiring and not self._open:
                self._on_change()
        return entry

    async def _run(self) -> None:
        backoff_s = self._options.first_backoff_s
        said = ""
        while True:
            reason = "the front door closed the stream"
            try:
                await self._stream()
                reason = "the group closed the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except (_Stale, TimeoutError) as error:
                reason = str(error) or "no answer to the greeting in time"
            except Exception:
                log.exception("stream to DP group %s broke unexpectedly", self.address.key)
                reason = "an unexpected error"
            finally:
                was_ready, num_open = self.ready, self.num_open
                self._lose(reason)
            backoff_s = self._options.first_backoff_s if was_ready else backoff_s * 2
            backoff_s = min(backoff_s, self._options.most_backoff_s)
            # A group that stays away says so once.
            level = logging.WARNING if was_ready or reason != said else logging.DEBUG
            said = reason
            log.log(level, "stream to DP group %s broke with %d sequences: %s", self.address.key, num_open, reason)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects

    async def _stream(self) -> None:
        """One stream, from its greeting to its end."""
        async with grpc.aio.insecure_channel(self.address.target, options=_CHANNEL_OPTIONS) as channel:
            call: _Connect = session_pb2_grpc.DPGroupStub(channel).Connect(  # type: ignore[call-arg]  # without an iterator, `write` sends
                metadata=(("shoal-secret", self._options.secret),)
            )
            writer = None
            try:
                async with asyncio.timeout(self._options.hello_timeout_s):
                    hello = session_pb2.Hello(front_door_id=self._options.front_door_id)
                    await call.write(session_pb2.Uplink(hello=hello))
                    first = await call.read()
                if not isinstance(first, session_pb2.Downlink):
                    return
                self._receive(first)
                self._begin(first)
                writer = asyncio.get_running_loop().create_task(self._write(call))
                while isinstance(message := await call.read(), session_pb2.Downlink):
                    self._receive(message)
            finally:
                if writer is not None:
                    writer.cancel()
                    await asyncio.gather(writer, return_exceptions=True)
                call.cancel()

    def _begin(self, first: session_pb2.Downlink) -> None:
        self.info = first.info
        self.ready = True
        log.info("stream to DP group %s is up, generation %d", self.address.key, first.generation)
        self._on_change()

    async def _write(self, call: _Connect) -> None:
        """Sends what is queued. A failure here shows in the reader too, which handles it."""
        while True:
            while self._uplinks:
                await call.write(self._uplinks.popleft())
            self._wake.clear()
            await self._wake.wait()

    def _receive(self, message: session_pb2.Downlink) -> None:
        if message.generation < self.generation:
            raise _Stale(f"the group is at generation {message.generation}, the roster at {self.generation}")
        self.generation = message.generation
        if message.HasField("load"):
            self.load = message.load
        for output in message.outputs:
            self._dispatch(output)
        for claimed in message.claimed:
            answer = self._claims.get(claimed.claim_id)
            if answer is not None and not answer.done():
                answer.set_result(claimed.records)

    def _dispatch(self, output: session_pb2.SequenceOutput) -> None:
        sequence_id = output.sequence_id
        entry = self._open.get(sequence_id)
        if entry is None:
            return  # it was cancelled while this was on its way
        if output.finish:
            self._forget(sequence_id)
            self.counts.num_failed += output.finish == session_pb2.FINISH_FAILED
        elif entry.prompt_tokens and output.token_ids:
            self._outstanding_tokens -= entry.prompt_tokens
            entry.prompt_tokens = 0
            self.counts.num_first_tokens += 1
            self.counts.first_tokens_s += time.monotonic() - entry.begun_s
        try:
            entry.sink.deliver(output)
        except Exception as error:
            # One sequence's trouble must not take down the stream of all others.
            self.cancel(sequence_id)
            entry.sink.broken(error)

    def _lose(self, reason: str) -> None:
        """The stream is gone, and with it everything on it."""
        was_ready, self.ready = self.ready, False
        self._uplinks.clear()
        self._wake.clear()
        lost, self._open = self._open, {}
        if not self.retiring:  # what is handed over has not failed
            self.counts.num_failed += len(lost)
        self._outstanding_tokens = 0
        self.load = session_pb2.Load()
        for answer in self._claims.values():
            if not answer.done():
                answer.set_result(())
        if was_ready:
            self.num_lost += 1
            self._on_change()
        for entry in lost.values():
            entry.sink.lost(reason)
