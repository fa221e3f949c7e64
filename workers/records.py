"""What a DP group keeps of its sequences for front doors that did not begin them.

A front door that dies takes its open requests with it: their clients come back at another one. So a group keeps each
sequence's submit and what came of it, while it runs and for a while after, and hands that to whoever claims it with
the request's name. Work is not kept: a sequence whose front door is gone ends at once, and goes on where it is
submitted again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.shoal.v1 import session_pb2

__all__ = ["Record", "Records"]

_COMPLETE = (session_pb2.FINISH_STOP, session_pb2.FINISH_LENGTH)


@dataclass(eq=False, slots=True)
class Record:
    """One sequence; `owner` says whose it is while it runs."""

    submit: session_pb2.Submit
    owner: tuple[int, int] | None  # number of the stream, and the sequence's id there
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[session_pb2.Logprobs] = field(default_factory=list)
    first: session_pb2.SequenceOutput | None = None
    last: session_pb2.SequenceOutput | None = None  # where it is complete

    @property
    def num_output_tokens(self) -> int:
        """From the first of the choice on."""
        return len(self.submit.output_token_ids) + len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """What keeping it costs."""
        return len(self.submit.prompt_token_ids) + self.num_output_tokens

    def see(self, output: session_pb2.SequenceOutput) -> None:
        """Before it is sent, so that what a client holds is always here. Once per sequence and step."""
        if output.token_ids:
            if self.first is None:
                self.first = output
            self.token_ids.extend(output.token_ids)
            if output.logprobs:
                self.logprobs.extend(output.logprobs)
        if output.finish in _COMPLETE:
            self.last = output

    def message(self) -> session_pb2.SequenceRecord:
        """For the wire."""
        output = session_pb2.SequenceOutput(
            position=len(self.submit.output_token_ids), token_ids=self.token_ids, logprobs=self.logprobs
        )
        if self.first is not None:
            output.num_cached_tokens = self.first.num_cached_tokens
            output.prompt_logprobs.extend(self.first.prompt_logprobs)
        if self.last is not None:
            output.finish = self.last.finish
            if self.last.HasField("stop_token_id"):
                output.stop_token_id = self.last.stop_token_id
        return session_pb2.SequenceRecord(submit=self.submit, output=output)


class Records:
    """What does not run any more is bounded by time, number and tokens; the oldest go first. Belongs to one thread."""

    def __init__(
        self, clock: Callable[[], float], *, keep_s: float, max_kept: int = 4096, max_kept_tokens: int = 4_000_000
    ) -> None:
        self._clock = clock
        self._keep_s = keep_s
        self._max_kept = max_kept
        self._max_kept_tokens = max_kept_tokens
        self._by_name: dict[tuple[str, str], list[Record]] = {}
        self._kept: OrderedDict[int, tuple[Record, float, int]] = OrderedDict()  # by id(record)
        self._num_kept_tokens = 0

    @property
    def num_kept(self) -> int:
        """Of sequences that do not run any more."""
        return len(self._kept)

    def begin(self, submit: session_pb2.Submit, owner: tuple[int, int]) -> Record:
        """A sequence that was submitted just now; it takes the place of earlier attempts that ended."""
        self._trim()
        record = Record(submit, owner)
        origin = submit.origin
        for other in list(self._by_name.get(_name(submit), ())):
            known = other.submit.origin
            same = (known.index, known.opened_unix_ns) == (origin.index, origin.opened_unix_ns)
            if other.owner is None and same:
                self.drop(other)
        self._by_name.setdefault(_name(submit), []).append(record)
        return record

    def keep(self, record: Record) -> None:
        """The sequence has ended here, or its front door has; the client may still ask for it."""
        record.owner = None
        self._kept[id(record)] = (record, self._clock() + self._keep_s, record.num_tokens)
        self._num_kept_tokens += record.num_tokens
        self._trim()

    def drop(self, record: Record) -> None:
        """Nobody will ask for it."""
        self._forget_kept(record)
        name = _name(record.submit)
        same = self._by_name.get(name, [])
        if record in same:
            same.remove(record)
            if not same:
                del self._by_name[name]

    def find(self, client: str, request_id: str) -> list[Record]:
        """Those of the newest request of that name; several attempts of a choice may be among them."""
        self._trim()
        found = self._by_name.get((client, request_id), [])
        newest = max((record.submit.origin.opened_unix_ns for record in found), default=0)
        return [record for record in found if record.submit.origin.opened_unix_ns == newest]

    def _forget_kept(self, record: Record) -> None:
        entry = self._kept.pop(id(record), None)
        if entry is not None:
            self._num_kept_tokens -= entry[2]

    def _trim(self) -> None:
        now_s = self._clock()
        while self._kept:
            record, until_s, _ = next(iter(self._kept.values()))
            too_many = len(self._kept) > self._max_kept or self._num_kept_tokens > self._max_kept_tokens
            if until_s > now_s and not too_many:
                return
            self.drop(record)


def _name(submit: session_pb2.Submit) -> tuple[str, str]:
    return submit.origin.client, submit.request_id
