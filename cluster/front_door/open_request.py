"""A client's call while it is open, and for a while after: its choices, and whoever reads them."""

from __future__ import annotations

import asyncio
from collections import deque

from cluster.front_door.call import Call, Chunk, Usage
from cluster.front_door.choice import Choice
from cluster.front_door.dispatcher import Dispatcher
from cluster.front_door.errors import Cancelled, DeadlineExceeded, RequestError
from cluster.front_door.groups import Clock, Timer
from cluster.front_door.incidents import incident
from cluster.front_door.metrics import RequestMeter
from cluster.front_door.spans import RequestSpan
from protos.shoal.v1 import session_pb2

__all__ = ["OpenRequest", "Reader"]


class Reader:
    """Names one reading of a call's output; a later one takes over."""


class OpenRequest:
    """Collects what the choices bring and gives it to one reader, a chunk per choice at a time.

    What arrives while the reader is busy is merged into its next chunk. Belongs to the event loop.
    """

    meter: RequestMeter  # both of the newest reading, which brings them
    span: RequestSpan

    def __init__(self, call: Call, *, dispatcher: Dispatcher, clock: Clock, min_gap_s: float = 0.0) -> None:
        self.call = call
        self.choices: tuple[Choice, ...] = ()
        self.cost_tokens = 0
        self.num_paid = 0  # tokens of the answer that its tenant was charged for
        self.deadline_s: float | None = None
        self.body_digest = ""  # where the client gave an idempotency key
        self.begun = asyncio.Event()
        self._dispatcher = dispatcher
        self._clock = clock
        self._min_gap_s = min_gap_s
        self._next_s = clock.time()  # before which there is no next chunk
        self._pausing = False
        self._fresh: deque[Choice] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._reader: Reader | None = None
        self._error: RequestError | None = None
        self._timer: Timer | None = None
        self._cancelled = False

    @property
    def key(self) -> tuple[str, str]:
        """Request ids are each client's own."""
        return (self.call.client, self.call.request_id)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.choices[0].submit.prompt_token_ids) if self.choices else 0

    @property
    def num_kept_tokens(self) -> int:
        """What keeping this call costs."""
        return self.num_prompt_tokens + sum(len(choice.output.token_ids) for choice in self.choices)

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self.choices)

    @property
    def has_news(self) -> bool:
        """Whether the reader has not been given everything."""
        return bool(self._fresh)

    @property
    def usage(self) -> Usage:
        """The call's tokens so far."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=sum(len(choice.output.token_ids) for choice in self.choices),
            cached_tokens=(self.choices[0].output.num_cached_tokens or 0) if self.choices else 0,
        )

    def expire_at(self, deadline_s: float | None) -> None:
        """Fails the call at a time of the clock."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.deadline_s = deadline_s
        if deadline_s is not None:
            self._timer = self._clock.call_later(max(0.0, deadline_s - self._clock.time()), self._expire)

    def begin(self, choices: tuple[Choice, ...]) -> None:
        """Sends the choices to DP groups."""
        self.choices = choices
        self.begun.set()
        for choice in choices:
            if self._cancelled:
                choice.cancel()
            elif self._error is None:
                self._dispatcher.place(choice, deadline_s=self.deadline_s)

    def restore(self, choices: tuple[Choice, ...]) -> None:
        """With choices that another front door began; `rewind` sends them on."""
        self.choices = choices
        self.begun.set()

    def attach(self) -> Reader:
        """A new reader; the one before it, if any, is told that it was replaced."""
        self._reader = reader = Reader()
        self._wake()
        return reader

    def rewind(self, positions: tuple[int, ...]) -> None:
        """Goes on for a client that holds this many tokens of each choice."""
        self._error = None
        self._fresh.clear()
        for choice, position in zip(self.choices, positions, strict=True):
            choice.output.rewind(position)
            choice.queued = choice.output.has_news
            if choice.queued:
                self._fresh.append(choice)
        for choice in self.choices:
            if not choice.finished and choice.link is None:
                self._dispatcher.place(choice, deadline_s=self.deadline_s)

    async def next_chunk(self, reader: Reader) -> Chunk | None:
        """The next chunk, or None after the last. Raises RequestError where the call failed."""
        while True:
            if reader is not self._reader:
                raise Cancelled("the request was resumed by another call")
            pause_s = self._next_s - self._clock.time() if self._may_pause else 0.0
            if self._fresh and pause_s <= 0:
                return self._take()
            if self._error is not None:
                raise self._error
            if self.finished:
                return None
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            self._pausing = bool(self._fresh)
            timer = self._clock.call_later(pause_s, self._wake) if self._pausing else None
            try:
                await waiter
            finally:
                self._pausing = False
                if timer is not None:
                    timer.cancel()
                if self._waiter is waiter:  # and not that of a reader who took over
                    self._waiter = None

    def is_read_by(self, reader: Reader) -> bool:
        return reader is self._reader

    def suspend(self) -> None:
        """Nobody reads any more: all work for the call ends at once. It may be taken up again."""
        self.expire_at(None)
        for choice in self.choices:
            self._dispatcher.forget(choice)

    def cancel(self) -> None:
        """By the client: every choice ends where it is."""
        self._cancelled = True
        for choice in self.choices:
            self._dispatcher.forget(choice, keep=False)
            choice.cancel()

    def fail(self, error: RequestError) -> None:
        """Ends the call; what has already come is still given to the reader before the error."""
        if self._error is None:
            self._error = error
        self.begun.set()
        for choice in self.choices:
            self._dispatcher.forget(choice)
        self._wake()

    def raise_failure(self) -> None:
        """Raises what has befallen the call before it began."""
        if self._error is not None:
            raise self._error

    def progressed(self, choice: Choice, output: session_pb2.SequenceOutput | None, num_new: int) -> None:
        if num_new:
            assert output is not None
            self.meter.tokens(choice.index, num_new, output, self.num_prompt_tokens)
        if choice.finished:
            self._dispatcher.forget(choice)
        if not choice.queued:
            choice.queued = True
            self._fresh.append(choice)
        if not (self._pausing and self._may_pause):
            self._wake()

    def failed(self, choice: Choice, error: Exception) -> None:
        during = f"request {self.call.request_id}"
        self.fail(error if isinstance(error, RequestError) else incident(error, during))

    def expired(self, choice: Choice, reason: str = "") -> None:
        self._expire(reason)

    def _expire(self, reason: str = "") -> None:
        self.fail(DeadlineExceeded(reason or "the deadline passed before the request was finished"))

    def _take(self) -> Chunk:
        choice = self._fresh.popleft()
        choice.queued = False
        if not self._fresh:
            self._next_s = self._clock.time() + self._min_gap_s
        last = choice.finished and not self._fresh and self.finished
        return choice.output.take(self.usage if last else None)

    @property
    def _may_pause(self) -> bool:
        """Whether more may come that the next chunk can wait for."""
        return self._error is None and not self.finished

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
