"""All DP groups that this front door can reach, and the choice between them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.front_door.groups import GroupAddress
from cluster.front_door.link import Link, LinkOptions
from scheduler.routing import RouteRequest, RoutingPolicy
from scheduler.versions import pick_version

__all__ = ["Links"]

log = logging.getLogger(__name__)

MakeLink = Callable[[GroupAddress, LinkOptions, Callable[[], None]], Link]


class Links:
    """One link per group of the roster.

    A group that leaves the roster gets nothing new, but what it is still answering it may finish: a roster that is
    late or restarts costs nothing. A group that is really gone shows on its stream.
    """

    def __init__(self, options: LinkOptions, policy: RoutingPolicy, *, make_link: MakeLink = Link) -> None:
        self._options = options
        self._make_link = make_link
        self._policy = policy
        self._links: dict[str, Link] = {}
        self._retired: list[Link] = []
        self._weights: dict[str, float] = {}
        self._listeners: list[Callable[[], None]] = []
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def links(self) -> Mapping[str, Link]:
        """The roster's groups by key."""
        return self._links

    @property
    def ready(self) -> bool:
        """Whether any group can take a sequence."""
        return any(link.ready for link in self._links.values())

    @property
    def every(self) -> Sequence[Link]:
        """Those of groups that left the roster, too, while something runs there."""
        return (*self._links.values(), *self._retired)

    @property
    def all_ready(self) -> Sequence[Link]:
        """Every group with a stream, those that left the roster too."""
        return [link for link in self.every if link.ready]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever a group becomes ready or is lost."""
        self._listeners.append(listener)

    def no_change(self, listener: Callable[[], None]) -> None:
        """Takes an `on_change` back."""
        self._listeners.remove(listener)

    def set_groups(self, groups: Iterable[GroupAddress], lost: Collection[str] = ()) -> None:
        """Takes the roster's newest list: connects to what is new, retires what has gone.

        What is `lost`, by address, is not waited for: a host that is out of reach does not even close its streams.
        """
        wanted = {group.key: group for group in groups}
        for key in [key for key in self._links if key not in wanted]:
            self._retire(key)
        for key, address in wanted.items():
            link = self._links.get(key)
            if link is not None and replace(link.address, generation=address.generation) == address:
                link.fence(address.generation)
                continue
            if link is not None:
                self._retire(key)
            self._links[key] = link = self._make_link(address, self._options, self._changed)
            link.start()
        over = set(lost) - {group.target for group in wanted.values()}
        for link in [link for link in self._retired if link.address.target in over]:
            link.give_up("the group was lost")
        self._changed()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Shares of new requests by version, where engines of several serve."""
        self._weights = dict(weights)

    def hand_over(self, key: str) -> None:
        """Ends the stream to a group that has left: what still runs there goes on elsewhere."""
        for link in [link for link in self._retired if link.address.key == key]:
            log.info("handing over %d sequences of DP group %s", link.num_open, key)
            self._close(link)

    def choose(self, request: RouteRequest, *, version: str | None = None) -> Link | None:
        """The group for a sequence, or None while none is ready. `version` is the one that has begun it."""
        links = list(self._links.values())
        ready = [link.address for link in links if link.ready]
        versions = {address.version for address in ready}
        if len(versions) > 1:
            # A version whose every group has just failed it is as good as gone: any other that there is can answer.
            sound = {address.version for address in ready if address.key not in request.avoid} or versions
            point = random.random()  # noqa: S311 - spreads requests
            chosen = pick_version(sound, self._weights, point, keep=version)
            links = [link for link in links if link.address.version == chosen]
        views = [link.view() for link in links]
        index = self._policy.choose(views, request)
        if index is None and request.avoid:
            # Every group that is up has just failed it: any of them is better than none.
            index = self._policy.choose(views, replace(request, avoid=frozenset()))
        return None if index is None else links[index]

    async def close(self) -> None:
        """Ends all streams; open sequences are lost."""
        links = [*self._links.values(), *self._retired]
        self._links.clear()
        self._retired.clear()
        await asyncio.gather(*(link.close() for link in links), *self._closing)

    def _retire(self, key: str) -> None:
        link = self._links.pop(key)
        link.retiring = True
        log.info("DP group %s left the roster with %d sequences of ours", key, link.num_open)
        self._retired.append(link)

    def _close(self, link: Link) -> None:
        self._retired.remove(link)
        task = asyncio.get_running_loop().create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _changed(self) -> None:
        for link in [link for link in self._retired if not link.num_open]:
            self._close(link)
        for listener in list(self._listeners):
            listener()
