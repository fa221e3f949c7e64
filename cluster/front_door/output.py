"""One choice's output so far: tokens, the text they make, and how much of it the client was given.

Everything here is a function of the tokens alone, so a choice that is replayed on another DP group goes on as if
nothing had happened, and a client that comes back can be given the rest from any position.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.front_door.call import Chunk, Usage
from cluster.front_door.stops import StopScanner
from cluster.front_door.text import IncrementalText
from protos.shoal.v1 import session_pb2
from scheduler.plan import FinishReason, TokenLogprobs

__all__ = ["ENDS", "ChoiceOutput", "PositionGap"]

ENDS = {
    session_pb2.FINISH_STOP: FinishReason.STOP,
    session_pb2.FINISH_LENGTH: FinishReason.LENGTH,
    session_pb2.FINISH_CANCELLED: FinishReason.CANCELLED,
}
"""The ends that a client sees as an end; every other one is an error, or hidden by a replay."""


class PositionGap(Exception):
    """Tokens are missing before this output: it must not be forwarded."""


class ChoiceOutput:
    """Takes a sequence's outputs in, gives `Chunk`s out."""

    __slots__ = (
        "_codec",
        "_given",
        "_given_first",
        "_logprobs",
        "_min_tokens",
        "_prompt_logprobs",
        "_prompt_token_ids",
        "_show_stop",
        "_stops",
        "_tail",
        "_texts",
        "finish",
        "index",
        "num_cached_tokens",
        "stop_string",
        "stop_token_id",
        "token_ids",
    )

    def __init__(
        self,
        index: int,
        *,
        text: IncrementalText,
        stops: StopScanner | None = None,
        min_tokens: int = 0,
        include_stop: bool = False,
        prompt_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None
        self.stop_string: str | None = None
        self.stop_token_id: int | None = None
        self.num_cached_tokens: int | None = None
        self._codec = text
        self._stops = stops
        self._min_tokens = min_tokens
        self._show_stop = include_stop
        self._prompt_token_ids = prompt_token_ids
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self._texts: list[str] = []  # per token: what may be shown once it is there
        self._logprobs: list[TokenLogprobs] = []
        self._tail = ""  # shown at the end: what was held back until then
        self._given = 0
        self._given_first = False

    @property
    def has_news(self) -> bool:
        """Whether the client has not been given everything."""
        return self._given < len(self.token_ids) or self.finish is not None

    def accept(self, output: session_pb2.SequenceOutput) -> int:
        """Takes one step's output; returns how many new tokens it held. Raises PositionGap.

        Tokens that are already here are skipped, tokens behind a stop string dropped. `finish` is set where the
        choice has ended, which may be sooner than the DP group knows.
        """
        assert self.finish is None
        before = len(self.token_ids)
        if output.position > before:
            raise PositionGap(f"position {output.position} follows {before} tokens")
        if self.num_cached_tokens is None and output.token_ids:
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs and not self._prompt_logprobs:
            self._prompt_logprobs = (None, *map(_logprobs, output.prompt_logprobs))
        token_ids: Sequence[int] = output.token_ids
        # A stop token is no text, where the client does not want it; what completes a grammar is.
        hidden = len(token_ids) - 1 if output.HasField("stop_token_id") and not self._show_stop else -1
        for at in range(before - output.position, len(token_ids)):
            self._push(token_ids[at], hide=at == hidden)
            if output.logprobs:
                self._logprobs.append(_logprobs(output.logprobs[at]))
            if self.stop_string is not None:
                self.finish = FinishReason.STOP
                return len(self.token_ids) - before
        if output.finish in ENDS:
            if output.HasField("stop_token_id"):
                self.stop_token_id = output.stop_token_id
            self.end(ENDS[output.finish])
        return len(self.token_ids) - before

    def end(self, reason: FinishReason) -> None:
        """No token follows: what was held back is due."""
        tail = self._codec.finish()
        if self._stops is not None:
            tail = self._stops.push(tail)
            self.stop_string = self._stops.matched
            tail += self._stops.finish()
        self._tail = tail
        self.finish = reason if self.stop_string is None else FinishReason.STOP

    def take(self, usage: Usage | None = None) -> Chunk:
        """All that the client has not been given, as one chunk."""
        start = self._given
        self._given = len(self.token_ids)
        first = not self._given_first
        self._given_first = True
        text = "".join(self._texts[start:])
        return Chunk(
            index=self.index,
            position=start,
            token_ids=tuple(self.token_ids[start:]),
            text=text + self._tail if self._tail else text,
            logprobs=tuple(self._logprobs[start:]) if self._logprobs else (),
            finish=self.finish,
            stop_string=self.stop_string,
            stop_token_id=self.stop_token_id,
            usage=usage,
            prompt_token_ids=self._prompt_token_ids if first else (),
            prompt_logprobs=self._prompt_logprobs if first else (),
        )

    def rewind(self, position: int) -> None:
        """Give everything from `position` on again, to a client that holds exactly the tokens before it."""
        assert 0 <= position <= len(self.token_ids)
        self._given = position
        self._given_first = position > 0

    def add_history(self, origin: session_pb2.Origin) -> None:
        """Writes down what a front door that takes the choice over needs beside its tokens."""
        origin.output_logprobs.extend(map(_entry, self._logprobs))
        origin.prompt_logprobs.extend(_entry(each) for each in self._prompt_logprobs if each is not None)
        if self.num_cached_tokens is not None:
            origin.num_cached_tokens = self.num_cached_tokens

    def _push(self, token_id: int, *, hide: bool) -> None:
        text = "" if hide else self._codec.push(token_id)
        self.token_ids.append(token_id)
        if self._stops is not None:
            text = self._stops.push(text, armed=len(self.token_ids) > self._min_tokens)
            self.stop_string = self._stops.matched
        self._texts.append(text)


def _logprobs(entry: session_pb2.Logprobs) -> TokenLogprobs:
    top = tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True))
    return TokenLogprobs(entry.token_id, entry.logprob, entry.rank, top)


def _entry(logprobs: TokenLogprobs) -> session_pb2.Logprobs:
    return session_pb2.Logprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )
