"""A client that comes back for a request which this front door did not take in, or holds no longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.front_door.call import Call
from cluster.front_door.choice import Choice
from cluster.front_door.claims import Claims
from cluster.front_door.dispatcher import Dispatcher
from cluster.front_door.errors import InvalidRequest
from cluster.front_door.open_request import OpenRequest
from cluster.front_door.origin import held_record, restored
from cluster.front_door.text import TextCodec
from protos.shoal.v1 import session_pb2
from scheduler.plan import FinishReason

__all__ = ["Comeback", "Held"]

MakeRequest = Callable[[Call], OpenRequest]


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What the client brings along: its request, and by choice the tokens that it holds and whether it saw the end."""

    call: Call
    token_ids: Sequence[Sequence[int]] = ()
    done: frozenset[int] = frozenset()


class Comeback:
    """Rebuilds open requests from what DP groups remember, or from what the client brings along."""

    def __init__(self, claims: Claims, codec: TextCodec, dispatcher: Dispatcher, make: MakeRequest) -> None:
        self._claims = claims
        self._codec = codec
        self._dispatcher = dispatcher
        self._make = make

    async def claim(
        self, client: str, request_id: str, held: Held | None = None, *, patience_s: float, door: str = ""
    ) -> OpenRequest | None:
        """A request that groups remember whole, taken from whoever has it; None where they do not.

        Groups that this front door has no stream to yet are waited for, up to `patience_s`.
        """
        done = held.done if held is not None and held.token_ids else frozenset[int]()
        records = list(await self._claims.find(client, request_id, patience_s=patience_s, done=done))
        if not records:
            return None
        known = {record.submit.origin.index for record in records}
        first = records[0].submit
        for index in sorted(done - known):
            assert held is not None
            submit = session_pb2.Submit()
            submit.CopyFrom(first)
            submit.origin.index = index
            records.append(held_record(submit, held.token_ids[index]))
        request = self._make(
            Call(
                token_ids=tuple(first.prompt_token_ids),
                request_id=request_id,
                client=client,
                tenant=first.tenant,
                priority=first.priority,
                door=door,
            )
        )
        request.body_digest = first.origin.body_digest
        records.sort(key=lambda record: record.submit.origin.index)
        choices = [self._choice(request, record, done - known) for record in records]
        request.cost_tokens = len(choices) * (len(first.prompt_token_ids) + first.sampling.max_tokens)
        request.restore(tuple(choices))
        return request

    def begin_with(self, request: OpenRequest, submits: Sequence[session_pb2.Submit], held: Held) -> None:
        """Fills a request that no group remembers with what the client holds of it. Raises InvalidRequest."""
        if len(held.token_ids) > len(submits):
            found = f"{len(held.token_ids)} choices are held, the request has {len(submits)}"
            raise InvalidRequest(found, field="held")
        tokens = [*held.token_ids, *[()] * (len(submits) - len(held.token_ids))]
        records = [held_record(submit, token_ids) for submit, token_ids in zip(submits, tokens, strict=True)]
        request.restore(tuple(self._choice(request, record, held.done) for record in records))

    def _choice(self, request: OpenRequest, record: session_pb2.SequenceRecord, ended: frozenset[int]) -> Choice:
        submit, output = restored(record, self._codec)
        if submit.origin.index in ended and output.finish is None:
            output.end(FinishReason.STOP)  # the client has seen how
        if output.finish is None and len(output.token_ids) >= submit.sampling.max_tokens:
            output.end(FinishReason.LENGTH)
        return Choice(output, submit, request, self._dispatcher)
