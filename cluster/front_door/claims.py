"""Asks the DP groups for a request that another front door took in."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence

from cluster.front_door.links import Links
from protos.shoal.v1 import session_pb2

__all__ = ["Claims", "complete"]

Records = Sequence[session_pb2.SequenceRecord]


class Claims:
    """A group that does not answer within `timeout_s` is taken not to know."""

    def __init__(self, links: Links, *, timeout_s: float = 1.0) -> None:
        self._links = links
        self._timeout_s = timeout_s

    async def find(self, client: str, request_id: str, *, patience_s: float, done: Iterable[int] = ()) -> Records:
        """The newest attempt at each choice, in order; nothing where one is missing that is not `done`.

        Groups that this front door has no stream to yet are waited for, up to `patience_s`.
        """
        changed = asyncio.Event()
        found: dict[str, Records] = {}
        until_s = asyncio.get_running_loop().time() + patience_s
        self._links.on_change(changed.set)
        try:
            while True:
                changed.clear()
                asked = [link for link in self._links.all_ready if link.address.key not in found]
                answers = await asyncio.gather(*(self._ask(link.claim(client, request_id)) for link in asked))
                found |= {link.address.key: answer for link, answer in zip(asked, answers, strict=True)}
                if records := complete((record for known in found.values() for record in known), done):
                    return records
                if found and all(link.ready for link in self._links.links.values()):
                    return ()
                async with asyncio.timeout_at(until_s):
                    await changed.wait()
        except TimeoutError:
            return ()
        finally:
            self._links.no_change(changed.set)

    async def cancel(self, client: str, request_id: str) -> bool:
        """Ends a request wherever it runs; whether it did."""
        claims = [link.claim(client, request_id, cancel=True) for link in self._links.all_ready]
        return any(await asyncio.gather(*map(self._ask, claims)))

    async def _ask(self, claim: Coroutine[object, object, Records]) -> Records:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await claim
        except TimeoutError:
            return ()


def complete(records: Iterable[session_pb2.SequenceRecord], done: Iterable[int] = ()) -> Records:
    """The newest attempt at each choice of the newest request among `records`, if no choice is missing."""
    best: dict[int, session_pb2.SequenceRecord] = {}
    every = list(records)
    opened = max((record.submit.origin.opened_unix_ns for record in every), default=0)
    for record in every:
        origin = record.submit.origin
        if origin.opened_unix_ns != opened:
            continue
        known = best.get(origin.index)
        if known is None or _age(known) < _age(record):
            best[origin.index] = record
    if not best:
        return ()
    wanted = set(range(next(iter(best.values())).submit.origin.n))
    return [best[index] for index in sorted(best)] if wanted <= {*best, *done} else ()


def _age(record: session_pb2.SequenceRecord) -> tuple[int, int]:
    return record.submit.origin.attempt, len(record.submit.output_token_ids) + len(record.output.token_ids)
