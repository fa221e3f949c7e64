"""One choice of a call: its output, and the sequence that makes it on some DP group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.front_door.errors import Cancelled, InvalidRequest
from cluster.front_door.link import Link
from cluster.front_door.output import ENDS, ChoiceOutput, PositionGap
from protos.shoal.v1 import session_pb2
from scheduler.plan import FinishReason

__all__ = ["Choice", "Owner", "Placer"]


class Owner(Protocol):
    """The call that a choice belongs to."""

    def progressed(self, choice: Choice, output: session_pb2.SequenceOutput | None, num_new: int) -> None:
        """There is something for the client."""
        ...

    def failed(self, choice: Choice, error: Exception) -> None:
        """The choice cannot be finished."""
        ...

    def expired(self, choice: Choice, reason: str = "") -> None:
        """The DP group found the deadline to be over, or out of reach for a `reason` that the client may hear."""
        ...


class Placer(Protocol):
    """Who finds a choice another DP group."""

    def replay(self, choice: Choice, *, avoid: str, reason: str) -> None: ...

    def refused(self, choice: Choice, *, by: Link, reason: str, retry_after_s: float | None) -> None: ...


class Choice:
    """A `groups.Sink`: hears of its sequence, wherever it runs."""

    __slots__ = (
        "_owner",
        "_placer",
        "interrupted_s",
        "link",
        "num_replays",
        "output",
        "prefix",
        "queued",
        "refused_by",
        "retry_after_s",
        "sequence_id",
        "submit",
        "version",
    )

    def __init__(self, output: ChoiceOutput, submit: session_pb2.Submit, owner: Owner, placer: Placer) -> None:
        self.output = output
        self.prefix: Sequence[bytes] | None = None  # the hashes of its prompt's beginnings, once they are needed
        self.submit = submit  # without its sequence id, its output so far and its deadline
        self.link: Link | None = None
        self.sequence_id = 0
        self.version: str | None = None  # of the engine that it was placed on last
        self.num_replays = 0
        self.queued = False  # in its owner's queue for the reader
        self.interrupted_s: float | None = None  # since when it has been waiting to go on
        self.refused_by: frozenset[str] = frozenset()
        self.retry_after_s: float | None = None  # the soonest hint of those that refused it
        self._owner = owner
        self._placer = placer

    @property
    def index(self) -> int:
        return self.output.index

    @property
    def finished(self) -> bool:
        return self.output.finish is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output together: what a group must hold in its cache to go on."""
        return len(self.submit.prompt_token_ids) + len(self.output.token_ids)

    def release(self, *, keep: bool = True) -> None:
        """Stops the work in the DP group, if any is going on. `keep`: the client may come back, here or elsewhere."""
        link, self.link = self.link, None
        if link is not None:
            link.cancel(self.sequence_id, keep=keep)

    def cancel(self) -> None:
        """Ends the choice where it is."""
        self.release(keep=False)
        if not self.finished:
            self.output.end(FinishReason.CANCELLED)
            self._owner.progressed(self, None, 0)

    def fail(self, error: Exception) -> None:
        self.release()
        self._owner.failed(self, error)

    def deliver(self, output: session_pb2.SequenceOutput) -> None:
        link = self.link
        assert link is not None
        if output.finish:
            self.link = None
        try:
            num_new = self.output.accept(output)
        except PositionGap as gap:
            self.link = link
            self.release()
            self._placer.replay(self, avoid=link.address.key, reason=str(gap))
            return
        if num_new:
            self.interrupted_s = None
            self.refused_by = frozenset()
        if self.finished:
            self.release()
        if num_new or self.finished:
            self._owner.progressed(self, output, num_new)
        if output.finish and output.finish not in ENDS and not self.finished:
            self._ended_badly(output, link)

    def lost(self, reason: str) -> None:
        link, self.link = self.link, None
        assert link is not None
        self._placer.replay(self, avoid=link.address.key, reason=reason)

    def broken(self, error: Exception) -> None:
        self.link = None
        self._owner.failed(self, error)

    def _ended_badly(self, output: session_pb2.SequenceOutput, link: Link) -> None:
        if output.finish == session_pb2.FINISH_DEADLINE:
            self._owner.expired(self, output.error)
        elif output.finish == session_pb2.FINISH_MOVED:
            self._owner.failed(self, Cancelled("the request was resumed by another call"))
        elif output.finish == session_pb2.FINISH_INVALID:
            self.fail(InvalidRequest(output.error, field="sampling"))
        elif output.finish == session_pb2.FINISH_REFUSED:
            hint_s = output.retry_after_s if output.HasField("retry_after_s") else None
            self._placer.refused(self, by=link, reason=output.error, retry_after_s=hint_s)
        else:
            self._placer.replay(self, avoid=link.address.key, reason=output.error or "the engine failed")
