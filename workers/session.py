"""The session server of a DP group: one stream per front door.

It runs in a thread of its own, on its own event loop, beside the step loop. Up come submits and cancels; down goes
one message per step with all of the stream's new tokens and the group's load. While a stream has nothing to hear,
the load follows within `_LOAD_INTERVAL_S` of a change, and once a second in any case. A stream that ends, however
it ends, takes its sequences with it; what is known of them stays for a while, for a front door that claims them.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import grpc
import uvloop

from protos.shoal.v1 import session_pb2, session_pb2_grpc
from scheduler.plan import Event, FinishReason
from scheduler.request import Request
from workers.guided import GrammarCompiler, GrammarError
from workers.loop import StepBatch, StepLoop
from workers.records import Record, Records
from workers.wire import load_to_proto, output_from_event, request_from_submit

__all__ = ["SessionServer"]

log = logging.getLogger(__name__)

_SECRET = "shoal-secret"  # noqa: S105 -- the name of the metadata, not its value
_HELLO_TIMEOUT_S = 10.0
_LOAD_INTERVAL_S = 0.1
_HEARTBEAT_S = 1.0
_START_TIMEOUT_S = 30.0
_FLUSH_S = 2.0
_MAX_UNSENT_OUTPUTS = 1 << 16  # a front door that reads nothing while so much piles up is cut off

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # for a frozen process, whose kernel answers; a minute unless set
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)

_OVER = (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.INVALID)

_Context = grpc.aio.ServicerContext[session_pb2.Uplink, session_pb2.Downlink]


class _Misuse(Exception):
    """The front door broke the protocol."""


@dataclass(eq=False, slots=True)
class _Stream:
    """One front door."""

    number: int
    front_door_id: str
    open: dict[int, Record | None] = field(default_factory=dict)  # None: nobody will hear of it any more
    outputs: list[session_pb2.SequenceOutput] = field(default_factory=list)
    claimed: list[session_pb2.Claimed] = field(default_factory=list)
    step: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    sent_s: float = 0.0
    sent_load: session_pb2.Load | None = None


class SessionServer(session_pb2_grpc.DPGroupServicer):
    """Serves `loop` at a free port of `host`. `info` and `generation` go to every front door; `records` outlive it.

    `grammars` compiles what guided sequences must match, beside the loop; None where none can, and
    `no_grammars` says why.
    """

    def __init__(
        self,
        loop: StepLoop,
        *,
        host: str,
        secret: bytes,
        generation: int,
        info: session_pb2.GroupInfo,
        vocab_size: int,
        records: Records,
        grammars: GrammarCompiler | None = None,
        no_grammars: str = "",
    ) -> None:
        self._steps = loop
        self._records = records
        self._host = host
        self._secret = secret
        self._generation = generation
        self._info = info
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._no_grammars = no_grammars
        self._compiling: dict[str, asyncio.Task[None]] = {}  # by key: sequences that wait for their grammar
        self._streams: dict[int, _Stream] = {}
        self._numbers = itertools.count(1)
        self._load = load_to_proto(loop.load)
        self._broken = False
        self._ending: asyncio.Event | None = None
        self._events: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._port = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="session", daemon=True)
        loop.attach(self)

    def start(self) -> int:
        """Begins to serve; returns the port."""
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S):
            raise TimeoutError("the session server did not start")
        if self._error is not None:
            raise RuntimeError("the session server did not start") from self._error
        return self._port

    def stop(self) -> None:
        """Ends all streams, and the thread."""
        self._call(self._end)
        self._thread.join()

    def renumber(self, generation: int) -> None:
        """What is sent from now on is of `generation`; every front door hears of it at once. From any thread."""
        self._call(self._renumber, generation)

    def deliver(self, batch: StepBatch) -> None:
        """From the step loop: one hand-over per step."""
        self._call(self._spread, batch)

    def broken(self) -> None:
        """From the step loop: what was delivered still goes out, then every stream ends as UNAVAILABLE."""
        self._call(self._break)

    def _renumber(self, generation: int) -> None:
        self._generation = generation
        for stream in self._streams.values():
            stream.wake.set()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if self._events is not None and not self._events.is_closed():
            try:
                self._events.call_soon_threadsafe(function, *arguments)
            except RuntimeError:
                log.debug("the session server has ended")

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            log.exception("the session server failed")
            self._error = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._ending = asyncio.Event()
        server = grpc.aio.server(options=_OPTIONS)
        session_pb2_grpc.add_DPGroupServicer_to_server(self, server)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._port = server.add_insecure_port(f"{host}:0")
        await server.start()
        self._events = asyncio.get_running_loop()
        self._started.set()
        pacer = asyncio.create_task(self._pace())
        await self._ending.wait()
        pacer.cancel()
        await asyncio.gather(pacer, return_exceptions=True)
        await server.stop(_FLUSH_S)

    def _end(self) -> None:
        assert self._ending is not None
        self._break()
        self._ending.set()

    def _break(self) -> None:
        self._broken = True
        for stream in self._streams.values():
            stream.wake.set()

    def _spread(self, batch: StepBatch) -> None:
        self._load = load_to_proto(batch.load)
        for event in batch.events:
            number, _, sequence_id = event.key.partition(":")
            stream = self._streams.get(int(number))
            if stream is None:
                continue  # it ended while this was on its way
            self._push(stream, event, int(sequence_id), batch.step)

    def _push(self, stream: _Stream, event: Event, sequence_id: int, step: int) -> None:
        output = output_from_event(event, sequence_id)
        record = stream.open.get(sequence_id)
        if record is not None:
            record.see(output)
        stream.outputs.append(output)
        stream.step = step
        if event.finish is not None:
            stream.open.pop(sequence_id, None)
            if record is not None:
                self._ended(record, event.finish)
        stream.wake.set()

    def _ended(self, record: Record, finish: FinishReason) -> None:
        # What never began would only stand in the way of a retry.
        if finish in _OVER or not record.num_output_tokens:
            self._records.drop(record)
        else:
            self._records.keep(record)

    async def _pace(self) -> None:
        """Wakes the streams that should hear of the load though they have no tokens to send."""
        while True:
            await asyncio.sleep(_LOAD_INTERVAL_S)
            now_s = time.monotonic()
            for stream in self._streams.values():
                if stream.sent_load != self._load or now_s - stream.sent_s >= _HEARTBEAT_S:
                    stream.wake.set()

    async def Connect(  # type: ignore[override]  # the stub knows generators only
        self, request_iterator: AsyncIterator[session_pb2.Uplink], context: _Context
    ) -> None:
        """One front door's stream, from its greeting to its end."""
        await self._authenticate(context)
        stream = await self._greet(request_iterator, context)
        self._streams[stream.number] = stream
        log.info("front door %s is connected", stream.front_door_id)
        tasks = {
            asyncio.create_task(self._read(stream, request_iterator)),
            asyncio.create_task(self._write(stream, context)),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._streams[stream.number]
            for sequence_id, record in stream.open.items():
                self._stop(f"{stream.number}:{sequence_id}")
                if record is not None:
                    self._records.keep(record)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            log.info("front door %s is gone, %d sequences with it", stream.front_door_id, len(stream.open))
        for result in results:
            if isinstance(result, _Misuse):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(result))
        if self._broken:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the DP group has ended")

    async def _authenticate(self, context: _Context) -> None:
        given = dict(context.invocation_metadata() or ()).get(_SECRET, "")
        if not hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._secret):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's secret is missing or wrong")
        if self._broken:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the DP group has ended")

    async def _greet(self, uplinks: AsyncIterator[session_pb2.Uplink], context: _Context) -> _Stream:
        hello: session_pb2.Uplink | None = None
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = await anext(uplinks, None)
        except TimeoutError:
            log.warning("a front door connected and did not say hello")
        if hello is None or not hello.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "hello must come first")
        stream = _Stream(next(self._numbers), hello.hello.front_door_id)
        await self._send(stream, context, info=self._info)
        return stream

    async def _read(self, stream: _Stream, uplinks: AsyncIterator[session_pb2.Uplink]) -> None:
        async for uplink in uplinks:
            if uplink.HasField("submit"):
                self._submit(stream, uplink.submit)
            elif uplink.HasField("cancel"):
                self._cancel(stream, uplink.cancel)
            elif uplink.HasField("claim"):
                self._claim(stream, uplink.claim)
            else:
                raise _Misuse("only submit, cancel and claim may follow hello")

    def _cancel(self, stream: _Stream, cancel: session_pb2.Cancel) -> None:
        self._stop(f"{stream.number}:{cancel.sequence_id}")
        record = stream.open.get(cancel.sequence_id)
        if record is None:
            return
        stream.open[cancel.sequence_id] = None
        if cancel.keep:
            self._records.keep(record)
        else:
            self._records.drop(record)

    def _claim(self, stream: _Stream, claim: session_pb2.Claim) -> None:
        found = self._records.find(claim.client, claim.request_id)
        claimed = session_pb2.Claimed(claim_id=claim.claim_id, records=[record.message() for record in found])
        for record in found:
            if record.owner is not None:
                self._take(record, session_pb2.FINISH_CANCELLED if claim.cancel else session_pb2.FINISH_MOVED)
            if claim.cancel:
                self._records.drop(record)
        stream.claimed.append(claimed)
        stream.wake.set()

    def _take(self, record: Record, finish: session_pb2.Finish.ValueType) -> None:
        """Takes a running sequence from its front door."""
        assert record.owner is not None
        number, sequence_id = record.owner
        position = record.num_output_tokens
        self._records.keep(record)
        self._stop(f"{number}:{sequence_id}")
        stream = self._streams[number]
        stream.open[sequence_id] = None
        stream.outputs.append(session_pb2.SequenceOutput(sequence_id=sequence_id, position=position, finish=finish))
        stream.wake.set()

    def _submit(self, stream: _Stream, submit: session_pb2.Submit) -> None:
        if submit.sequence_id in stream.open:
            raise _Misuse(f"sequence_id {submit.sequence_id} is open already")
        stream.open[submit.sequence_id] = self._records.begin(submit, (stream.number, submit.sequence_id))
        key = f"{stream.number}:{submit.sequence_id}"
        try:
            request = request_from_submit(submit, key=key, now_s=self._steps.clock(), vocab_size=self._vocab_size)
        except ValueError as error:
            position = len(submit.output_token_ids)
            refused = Event(key=key, position=position, finish=FinishReason.REFUSED, error=str(error))
            self._push(stream, refused, submit.sequence_id, stream.step)
            return
        if request.sampling.grammar is None:
            self._steps.submit(request, self)
        else:
            self._compiling[key] = asyncio.create_task(self._submit_guided(request))

    async def _submit_guided(self, request: Request) -> None:
        """Submits a sequence once its grammar is compiled."""
        sampling, position = request.sampling, len(request.output_token_ids)
        assert sampling.grammar is not None
        try:
            if self._grammars is None:
                raise GrammarError(f"cannot be used: {self._no_grammars}")
            compiled = await self._grammars.compile(sampling.grammar, request.eos_token_ids)
        except GrammarError as error:
            self._end_early(Event(request.key, position, finish=FinishReason.INVALID, error=f"guided {error}"))
        else:
            self._steps.submit(replace(request, sampling=replace(sampling, grammar=compiled)), self)
        finally:
            self._compiling.pop(request.key, None)

    def _stop(self, key: str) -> None:
        """Ends a sequence wherever it is: its owner hears of it afterwards."""
        task = self._compiling.pop(key, None)
        if task is None:
            self._steps.cancel(key)
            return
        task.cancel()
        assert self._events is not None
        self._events.call_soon(self._end_early, Event(key, 0, finish=FinishReason.CANCELLED))

    def _end_early(self, event: Event) -> None:
        """Tells of a sequence of which the loop never heard."""
        number, _, sequence_id = event.key.partition(":")
        stream = self._streams.get(int(number))
        if stream is not None:
            self._push(stream, event, int(sequence_id), stream.step)

    async def _write(self, stream: _Stream, context: _Context) -> None:
        while True:
            await stream.wake.wait()
            stream.wake.clear()
            if len(stream.outputs) > _MAX_UNSENT_OUTPUTS:
                raise _Misuse("the front door does not read")
            ending = self._broken
            await self._send(stream, context)
            if ending:
                return

    async def _send(self, stream: _Stream, context: _Context, info: session_pb2.GroupInfo | None = None) -> None:
        outputs, stream.outputs = stream.outputs, []
        claimed, stream.claimed = stream.claimed, []
        stream.sent_load, stream.sent_s = self._load, time.monotonic()
        await context.write(
            session_pb2.Downlink(
                generation=self._generation,
                step=stream.step,
                outputs=outputs,
                load=self._load,
                info=info,
                claimed=claimed,
            )
        )
