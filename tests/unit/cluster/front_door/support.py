"""A desk on links without a network: the test says what the DP groups say."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from cluster.front_door.call import Call, Chunk
from cluster.front_door.desk import Desk
from cluster.front_door.groups import GroupAddress
from cluster.front_door.limits import Limits
from cluster.front_door.link import Link, LinkOptions
from cluster.front_door.links import Links
from cluster.front_door.metrics import FrontDoorMetrics
from cluster.front_door.model_card import ModelCard
from protos.shoal.v1 import session_pb2 as pb
from scheduler.routing import LeastLoaded, RoutingPolicy
from tests.fakes import CARD, ByteCodec, LineTemplate

__all__ = ["Bench", "ManualClock", "ScriptedLink", "address", "bench", "turns"]


class ManualClock:
    """Time stands until `advance`."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._due: list[tuple[float, int, _Call]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self._now_s

    def call_later(self, delay: float, callback: Callable[[], object], /) -> _Call:
        call = _Call(callback)
        heapq.heappush(self._due, (self._now_s + delay, next(self._order), call))
        return call

    def advance(self, seconds: float) -> None:
        """Makes the calls that are due, in their order and at their time."""
        end_s = self._now_s + seconds
        while self._due and self._due[0][0] <= end_s:
            self._now_s, _, call = heapq.heappop(self._due)
            if not call.cancelled:
                call.callback()
        self._now_s = end_s


@dataclass
class _Call:
    callback: Callable[[], object]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class ScriptedLink(Link):
    """A link whose stream is the test."""

    def __init__(self, where: GroupAddress, options: LinkOptions, on_change: Callable[[], None]) -> None:
        super().__init__(where, options, on_change)
        self.records: list[pb.SequenceRecord] = []
        self.claims: list[tuple[str, str, bool]] = []

    def start(self) -> None:
        pass

    async def close(self) -> None:
        self._lose("closed")

    def up(self, *, num_blocks: int = 1000) -> ScriptedLink:
        """The group's first message."""
        info = pb.GroupInfo(engine="engine", block_size=16, num_blocks=num_blocks)
        first = pb.Downlink(generation=max(1, self.generation), info=info, load=pb.Load(num_blocks=num_blocks))
        self._receive(first)
        self._begin(first)
        return self

    def down(self, reason: str = "it died") -> None:
        self._lose(reason)

    async def claim(self, client: str, request_id: str, *, cancel: bool = False) -> Sequence[pb.SequenceRecord]:
        """What the test lays down in `records`."""
        self.claims.append((client, request_id, cancel))
        return self.records

    def say(self, *outputs: pb.SequenceOutput, generation: int | None = None) -> None:
        """One step's message."""
        self._receive(pb.Downlink(generation=self.generation if generation is None else generation, outputs=outputs))

    def answer(self, submit: pb.Submit, text: str, *, finish: pb.Finish.ValueType = pb.FINISH_UNSPECIFIED) -> None:
        """The next tokens of a sequence that has said nothing on this stream yet but what it was replayed with."""
        position = len(submit.output_token_ids)
        self.say(
            pb.SequenceOutput(sequence_id=submit.sequence_id, position=position, token_ids=text.encode(), finish=finish)
        )
        submit.output_token_ids.extend(text.encode())

    def end(
        self, submit: pb.Submit, finish: pb.Finish.ValueType, error: str = "", retry_after_s: float | None = None
    ) -> None:
        """A sequence's end without a token."""
        self.say(
            pb.SequenceOutput(
                sequence_id=submit.sequence_id,
                position=len(submit.output_token_ids),
                finish=finish,
                error=error,
                retry_after_s=retry_after_s,
            )
        )

    @property
    def submits(self) -> list[pb.Submit]:
        """All that were sent since the stream was up."""
        return [uplink.submit for uplink in self._uplinks if uplink.HasField("submit")]

    @property
    def cancels(self) -> list[int]:
        return [uplink.cancel.sequence_id for uplink in self._uplinks if uplink.HasField("cancel")]


def address(key: str = "engine/0", *, port: int = 1, generation: int = 1) -> GroupAddress:
    return GroupAddress(key=key, engine="engine", dp_group=0, host="127.0.0.1", port=port, generation=generation)


@dataclass
class Bench:
    """A desk and what it stands on."""

    desk: Desk
    links: Links
    clock: ManualClock
    metrics: FrontDoorMetrics
    registry: CollectorRegistry
    made: dict[str, ScriptedLink] = field(default_factory=dict)

    def link(self, index: int = 0) -> ScriptedLink:
        return self.made[f"engine/{index}"]

    def value(self, name: str, **labels: str) -> float:
        """A metric's sample; 0 where there is none."""
        return self.registry.get_sample_value(name, {"model_name": "fake", **labels}) or 0.0

    async def begin(self, call: Call) -> tuple[asyncio.Task[list[Chunk]], list[pb.Submit]]:
        """Opens a call, reading all of it in a task; the submits that it led to."""
        before = {id(link): len(link.submits) for link in self.made.values()}
        task = asyncio.create_task(read(self.desk, call))
        await turns()
        return task, [submit for link in self.made.values() for submit in link.submits[before[id(link)] :]]


async def read(desk: Desk, call: Call) -> list[Chunk]:
    return [chunk async for chunk in desk.open(call)]


async def turns(number: int = 10) -> None:
    """Lets every task that can run do so."""
    for _ in range(number):
        await asyncio.sleep(0)


def bench(
    keys: Iterable[str] = ("engine/0", "engine/1"),
    *,
    limits: Limits | None = None,
    card: ModelCard = CARD,
    up: bool = True,
    policy: RoutingPolicy | None = None,
) -> Bench:
    """A desk with this many groups."""
    clock = ManualClock()
    made: dict[str, ScriptedLink] = {}

    def make_link(where: GroupAddress, options: LinkOptions, on_change: Callable[[], None]) -> Link:
        made[where.key] = link = ScriptedLink(where, options, on_change)
        link._ids = itertools.count(1000 * where.port)  # so that a sequence id names its group, too
        return link

    links = Links(LinkOptions(front_door_id="test", secret="x"), policy or LeastLoaded(), make_link=make_link)
    metrics = FrontDoorMetrics(card.name, clock)
    metrics.watch(links)
    registry = CollectorRegistry()
    metrics.register(registry)
    desk = Desk(
        card=card,
        codec=ByteCodec(),
        template=LineTemplate(),
        links=links,
        limits=limits or Limits(min_chunk_gap_s=0.0),
        metrics=metrics,
        clock=clock,
    )
    links.set_groups([address(key, port=port) for port, key in enumerate(keys, 1)])
    if up:
        for link in made.values():
            link.up()
    return Bench(desk, links, clock, metrics, registry, made)
