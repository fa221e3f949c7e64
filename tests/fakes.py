"""Small real stand-ins: a DP group that speaks the real wire, a tokenizer of bytes, a template of lines.

`FakeGroup` is a grpc.aio server on a free port whose next token is a function of prompt, output and seed, like a real
group's, so that a replayed sequence must go on exactly. It has no model, no queue and no batch limit.
"""

from __future__ import annotations

import asyncio
import codecs
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from cluster.front_door.call import Message
from cluster.front_door.groups import GroupAddress
from cluster.front_door.model_card import ModelCard
from protos.shoal.v1 import session_pb2, session_pb2_grpc
from workers.records import Record, Records

__all__ = [
    "BOS",
    "CARD",
    "EOS",
    "SECRET",
    "VOCAB_SIZE",
    "ByteCodec",
    "FakeGroup",
    "LineTemplate",
    "NextToken",
    "hashed",
    "says",
    "serving",
]

BOS = 256
EOS = 257
VOCAB_SIZE = 260
SECRET = "between ourselves"
CARD = ModelCard(name="fake", aliases=("fake-1b",), max_model_len=512, vocab_size=VOCAB_SIZE, dtype="float32")

NextToken = Callable[[Sequence[int], Sequence[int], int], int]
"""Prompt, output so far and seed to the next token."""


def hashed(prompt: Sequence[int], output: Sequence[int], seed: int) -> int:
    """A letter that depends on everything before it: a stream that was not continued exactly goes astray."""
    history = ",".join(map(str, [*prompt, -1, *output, seed]))
    return ord("a") + zlib.crc32(history.encode()) % 26


def says(text: str) -> NextToken:
    """Answers `text`, then the end."""
    answer = text.encode()

    def next_token(prompt: Sequence[int], output: Sequence[int], seed: int) -> int:
        return answer[len(output)] if len(output) < len(answer) else EOS

    return next_token


class ByteCodec:
    """Token ids 0 to 255 are bytes, then come beginning and end of text, and two ids without text."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = frozenset({EOS})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS, *text.encode()] if add_special_tokens else list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(_bytes_of(token_id, skip_special_tokens) for token_id in ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return _bytes_of(token_id, skip_special_tokens=False)

    def detokenizer(self, skip_special_tokens: bool = True, *, continues: bool = False) -> _ByteDetokenizer:
        return _ByteDetokenizer(skip_special_tokens)


class _ByteDetokenizer:
    def __init__(self, skip_special_tokens: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._skip_special_tokens = skip_special_tokens

    def push(self, token_id: int) -> str:
        return self._decoder.decode(_bytes_of(token_id, self._skip_special_tokens))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _bytes_of(token_id: int, skip_special_tokens: bool) -> bytes:
    if token_id < 256:
        return bytes([token_id])
    return b"" if skip_special_tokens else f"<{token_id}>".encode()


class LineTemplate:
    """`role: content` lines."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **kwargs: object) -> str:
        if any(message.role not in {"system", "user", "assistant"} for message in messages):
            raise ValueError("a role is one of system, user and assistant")
        lines = [f"{message.role}: {message.content}\n" for message in messages]
        return "".join([*lines, "assistant: "] if add_generation_prompt else lines)


@dataclass(slots=True)
class _Sequence:
    submit: session_pb2.Submit
    output: list[int]
    record: Record
    told_first: bool = False


@dataclass(slots=True, eq=False)
class _Stream:
    """One front door's Connect."""

    front_door_id: str
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    fresh: list[session_pb2.SequenceOutput] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    claimed: list[session_pb2.Claimed] = field(default_factory=list)
    broken: bool = False
    number: int = 0


class FakeGroup(session_pb2_grpc.DPGroupServicer):
    """Start it, then script it; every knob may be turned while it serves.

    `tokens_per_step` above one gives several tokens in one output. `step_s` slows each step down. `hold_at` stops
    every sequence before that output position.
    """

    def __init__(self, next_token: NextToken = hashed, *, key: str = "engine/0", max_model_len: int = 512) -> None:
        self.next_token = next_token
        self.key = key
        self.max_model_len = max_model_len
        self.generation = 1
        self.tokens_per_step = 1
        self.step_s = 0.0
        self.num_blocks = 1000
        self.refuse: str | None = None
        self.retry_after_s: float | None = None  # said with a refusal
        self.invalid: str | None = None
        self.fail_at: int | None = None
        self.hold_at: int | None = None
        self.num_cached_tokens = 0
        self.submits: list[session_pb2.Submit] = []
        self.cancels: list[int] = []
        self.num_streams = 0
        self.port = 0
        self.records = Records(time.monotonic, keep_s=60.0)
        self._streams: set[_Stream] = set()
        self._server: grpc.aio.Server | None = None
        self._paused = False
        self._changed = asyncio.Condition()
        self._step = 0

    @property
    def address(self) -> GroupAddress:
        engine, _, index = self.key.rpartition("/")
        return GroupAddress(
            key=self.key,
            engine=engine,
            dp_group=int(index),
            host="127.0.0.1",
            port=self.port,
            generation=self.generation,
        )

    @property
    def num_running(self) -> int:
        """Sequences on all streams."""
        return sum(len(stream.sequences) for stream in self._streams)

    async def start(self, port: int = 0) -> None:
        options = (
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        )
        self._server = grpc.aio.server(options=options)
        session_pb2_grpc.add_DPGroupServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    async def stop(self) -> None:
        """At once, as a killed process would."""
        if self._server is not None:
            self.break_streams()
            await self._server.stop(None)
            self._server = None

    def pause(self) -> None:
        """No step runs until `go_on`."""
        self._paused = True

    def release(self) -> None:
        """What `hold_at` held goes on."""
        self.hold_at = None
        self.go_on()

    def go_on(self) -> None:
        self._paused = False
        for stream in self._streams:
            stream.wake.set()

    def break_streams(self) -> None:
        """Ends every stream with an error; new ones are taken."""
        for stream in self._streams:
            stream.broken = True
            stream.wake.set()

    async def until(self, holds: Callable[[FakeGroup], bool]) -> None:
        """Waits for something to be true of this group."""
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: holds(self))

    async def Connect(
        self,
        request_iterator: AsyncIterator[session_pb2.Uplink],
        context: grpc.aio.ServicerContext[session_pb2.Uplink, session_pb2.Downlink],
    ) -> AsyncIterator[session_pb2.Downlink]:
        metadata = dict(context.invocation_metadata() or ())
        if metadata.get("shoal-secret") != SECRET:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong secret")
        hello = await anext(request_iterator)
        assert hello.WhichOneof("message") == "hello"
        self.num_streams += 1
        stream = _Stream(hello.hello.front_door_id, number=self.num_streams)
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            info = session_pb2.GroupInfo(
                engine="engine", max_model_len=self.max_model_len, block_size=16, num_blocks=self.num_blocks
            )
            yield session_pb2.Downlink(generation=self.generation, info=info, load=self._load())
            await self._notify()
            while True:
                message = await self._next(stream)
                if message is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
                else:
                    yield message
                    await self._notify()
        finally:
            self._streams.discard(stream)
            for sequence in stream.sequences.values():
                self.records.keep(sequence.record)
            reader.cancel()

    async def _read(self, stream: _Stream, uplinks: AsyncIterator[session_pb2.Uplink]) -> None:
        async for uplink in uplinks:
            if uplink.WhichOneof("message") == "submit":
                self._submit(stream, uplink.submit)
            elif uplink.WhichOneof("message") == "claim":
                self._claim(stream, uplink.claim)
            else:
                self.cancels.append(uplink.cancel.sequence_id)
                sequence = stream.sequences.pop(uplink.cancel.sequence_id, None)
                if sequence is not None:
                    (self.records.keep if uplink.cancel.keep else self.records.drop)(sequence.record)
            stream.wake.set()
            await self._notify()

    def _submit(self, stream: _Stream, submit: session_pb2.Submit) -> None:
        self.submits.append(submit)
        if self.refuse is not None:
            refusal = self._end(submit, session_pb2.FINISH_REFUSED, self.refuse)
            if self.retry_after_s is not None:
                refusal.retry_after_s = self.retry_after_s
            stream.fresh.append(refusal)
        elif self.invalid is not None:
            stream.fresh.append(self._end(submit, session_pb2.FINISH_INVALID, self.invalid))
        else:
            record = self.records.begin(submit, (stream.number, submit.sequence_id))
            stream.sequences[submit.sequence_id] = _Sequence(submit, list(submit.output_token_ids), record)

    def _claim(self, stream: _Stream, claim: session_pb2.Claim) -> None:
        found = self.records.find(claim.client, claim.request_id)
        answer = session_pb2.Claimed(claim_id=claim.claim_id, records=[record.message() for record in found])
        stream.claimed.append(answer)
        for record in found:
            if record.owner is None:
                continue
            number, sequence_id = record.owner
            owner = next(each for each in self._streams if each.number == number)
            del owner.sequences[sequence_id]
            finish = session_pb2.FINISH_CANCELLED if claim.cancel else session_pb2.FINISH_MOVED
            owner.fresh.append(self._end(record.submit, finish, "", record.num_output_tokens))
            owner.wake.set()
            (self.records.drop if claim.cancel else self.records.keep)(record)

    async def _next(self, stream: _Stream) -> session_pb2.Downlink | None:
        """The next step's message for one stream; None once it is broken."""
        while not stream.broken:
            outputs, stream.fresh = stream.fresh, []
            claimed, stream.claimed = stream.claimed, []
            for sequence_id, sequence in list(stream.sequences.items()) if not self._paused else ():
                output = self._advance(sequence)
                if output is None:
                    continue
                outputs.append(output)
                sequence.record.see(output)
                if output.finish:
                    del stream.sequences[sequence_id]
                    self.records.keep(sequence.record)
            if stream.broken:
                break
            if outputs or claimed:
                self._step += 1
                await asyncio.sleep(self.step_s)
                return session_pb2.Downlink(
                    generation=self.generation,
                    step=self._step,
                    outputs=outputs,
                    load=self._load(),
                    claimed=claimed,
                )
            stream.wake.clear()
            await stream.wake.wait()
        return None

    def _advance(self, sequence: _Sequence) -> session_pb2.SequenceOutput | None:
        submit, output = sequence.submit, sequence.output
        if self.fail_at is not None and len(output) >= self.fail_at:
            return self._end(submit, session_pb2.FINISH_FAILED, "a rank died", len(output))
        result = session_pb2.SequenceOutput(sequence_id=submit.sequence_id, position=len(output))
        for _ in range(self.tokens_per_step):
            if result.finish or (self.hold_at is not None and len(output) >= self.hold_at):
                break
            self._sample(submit, output, result)
        if not result.token_ids:
            return None
        if not sequence.told_first:
            sequence.told_first = True
            result.queue_s, result.prefill_s, result.num_cached_tokens = 0.001, 0.002, self.num_cached_tokens
            if submit.sampling.HasField("prompt_logprobs"):
                rest = submit.prompt_token_ids[1:]
                result.prompt_logprobs.extend(_logprobs(token_id, submit.sampling.prompt_logprobs) for token_id in rest)
        return result

    def _sample(self, submit: session_pb2.Submit, output: list[int], result: session_pb2.SequenceOutput) -> None:
        sampling = submit.sampling
        token_id = self.next_token(submit.prompt_token_ids, output, sampling.seed)
        output.append(token_id)
        result.token_ids.append(token_id)
        if sampling.HasField("logprobs"):
            result.logprobs.append(_logprobs(token_id, sampling.logprobs))
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(submit.eos_token_ids))
        if token_id in ends and len(output) >= sampling.min_tokens:
            result.finish, result.stop_token_id = session_pb2.FINISH_STOP, token_id
        elif len(output) >= sampling.max_tokens:
            result.finish = session_pb2.FINISH_LENGTH

    @staticmethod
    def _end(
        submit: session_pb2.Submit, finish: session_pb2.Finish.ValueType, error: str, position: int | None = None
    ) -> session_pb2.SequenceOutput:
        at = len(submit.output_token_ids) if position is None else position
        return session_pb2.SequenceOutput(sequence_id=submit.sequence_id, position=at, finish=finish, error=error)

    def _load(self) -> session_pb2.Load:
        return session_pb2.Load(
            num_running=self.num_running, num_blocks=self.num_blocks, num_free_blocks=self.num_blocks - self.num_running
        )

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _logprobs(token_id: int, num_top: int) -> session_pb2.Logprobs:
    top = [(token_id + offset) % VOCAB_SIZE for offset in range(num_top)]
    return session_pb2.Logprobs(
        token_id=token_id,
        logprob=-0.5,
        rank=1,
        top_token_ids=top,
        top_logprobs=[-0.5 - offset for offset in range(num_top)],
    )


@asynccontextmanager
async def serving(*groups: FakeGroup) -> AsyncIterator[None]:
    """Starts the groups, and stops them whatever happens."""
    try:
        for group in groups:
            await group.start()
        yield
    finally:
        for group in groups:
            await group.stop()
