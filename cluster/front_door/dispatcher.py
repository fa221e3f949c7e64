"""Finds each choice a DP group, and another one when that fails.

A replayed sequence carries its prompt and the tokens that the client may already hold, and goes on behind them.
While no group is up, choices wait here: the client sees a pause.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cluster.front_door.choice import Choice
from cluster.front_door.errors import InvalidRequest, Overloaded, Unavailable
from cluster.front_door.groups import Clock, Timer
from cluster.front_door.limits import Limits
from cluster.front_door.link import Link
from cluster.front_door.links import Links
from cluster.front_door.metrics import FrontDoorMetrics
from cluster.front_door.origin import note_history
from scheduler.routing import RouteRequest, route_prefix

__all__ = ["Dispatcher"]

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.05
_MOST_BACKOFF_S = 2.0
# What a refused client is told where the groups could not say, and the least of what they could.
_RETRY_S = 1.0
_LEAST_RETRY_S = 0.05


class Dispatcher:
    """Places, replays and parks choices. Belongs to the event loop."""

    def __init__(
        self, links: Links, limits: Limits, clock: Clock, metrics: FrontDoorMetrics, *, share_prefixes: bool = False
    ) -> None:
        self._links = links
        self._share_prefixes = share_prefixes
        self._limits = limits
        self._clock = clock
        self._parked: dict[Choice, Timer] = {}
        self._deadlines_s: dict[Choice, float] = {}
        self._metrics = metrics
        self._was_ready = False
        self._down_since_s: float | None = None
        links.on_change(self._links_changed)

    @property
    def worth_waiting(self) -> bool:
        """Whether a group has been up lately, so that one may soon be again."""
        down_s = 0.0 if self._down_since_s is None else self._clock.time() - self._down_since_s
        return self._was_ready and down_s < self._limits.replay_patience_s

    def place(self, choice: Choice, *, deadline_s: float | None = None) -> None:
        """Sends a choice to a group, or keeps it until there is one."""
        if deadline_s is not None:
            self._deadlines_s[choice] = deadline_s
        self._place(choice, avoid=frozenset())

    def forget(self, choice: Choice, *, keep: bool = True) -> None:
        """The choice has ended or was given up: no group works for it. Without `keep` none remembers it either."""
        choice.release(keep=keep)
        self._unpark(choice)
        self._deadlines_s.pop(choice, None)

    def replay(self, choice: Choice, *, avoid: str, reason: str) -> None:
        """Goes on with a choice whose sequence was lost."""
        choice.num_replays += 1
        self._metrics.num_replays += 1
        self._interrupt(choice)
        if choice.num_replays > self._limits.max_replays:
            log.error("giving up on %s after %d replays: %s", _name(choice), self._limits.max_replays, reason)
            choice.fail(Unavailable("the engines failed this request too often", retry_after_s=1.0))
            return
        log.info("replaying %s from position %d: %s", _name(choice), len(choice.output.token_ids), reason)
        if choice.num_replays == 1:
            self._place(choice, avoid=frozenset({avoid}))
        else:
            self._later(choice, choice.num_replays - 2)

    def refused(self, choice: Choice, *, by: Link, reason: str, retry_after_s: float | None) -> None:
        """A group would not take the choice: another may; if none does, the client hears why, and when to come back."""
        choice.refused_by |= {by.address.key}
        hints_s = [each for each in (choice.retry_after_s, retry_after_s) if each is not None]
        choice.retry_after_s = min(hints_s, default=None)
        others = [link for key, link in self._links.links.items() if link.ready and key not in choice.refused_by]
        if others:
            self._place(choice, avoid=choice.refused_by)
        elif all(_never_fits(choice, link) for link in [by, *self._links.links.values()] if link.ready):
            choice.fail(InvalidRequest(reason, field="prompt"))
        elif choice.num_replays:
            # Its stream has begun: a full queue is a pause, not an end.
            self._interrupt(choice)
            choice.refused_by = frozenset()
            self._later(choice, choice.num_replays)
        else:
            hint_s = _RETRY_S if choice.retry_after_s is None else max(choice.retry_after_s, _LEAST_RETRY_S)
            choice.fail(Overloaded(reason or "every DP group is full", retry_after_s=hint_s))

    def _place(self, choice: Choice, *, avoid: frozenset[str]) -> None:
        self._unpark(choice)
        output = choice.output.token_ids
        wanted = choice.submit.sampling.max_tokens - len(output)
        request = RouteRequest(
            num_tokens=choice.num_tokens,
            max_tokens=wanted,
            avoid=avoid,
            prefix=self._prefix_of(choice),
            now_s=self._clock.time(),
        )
        link = self._links.choose(request, version=choice.version)
        if link is None:
            self._park(choice)
            return
        submit = choice.submit
        note_history(submit, choice.output)
        deadline_s = self._deadlines_s.get(choice)
        if deadline_s is not None:
            submit.timeout_s = max(0.0, deadline_s - self._clock.time())
        choice.link = link
        choice.version = link.address.version
        choice.sequence_id = link.submit(submit, choice)

    def _prefix_of(self, choice: Choice) -> Sequence[bytes]:
        """As the DP groups' caches see it: the same tokens of another tenant are another prefix."""
        if choice.prefix is None:
            tenant = "" if self._share_prefixes else choice.submit.tenant
            choice.prefix = route_prefix(choice.submit.prompt_token_ids, tenant)
        return choice.prefix

    def _interrupt(self, choice: Choice) -> None:
        if choice.interrupted_s is None:
            choice.interrupted_s = self._clock.time()

    def _later(self, choice: Choice, attempt: int) -> None:
        """Tries again after a pause, which lets a group that regroups come back."""
        if self._left_s(choice) <= 0:
            self._give_up(choice)
            return
        delay_s = min(_FIRST_BACKOFF_S * 2 ** min(attempt, 10), _MOST_BACKOFF_S)
        self._parked[choice] = self._clock.call_later(delay_s, lambda: self._place(choice, avoid=frozenset()))

    def _park(self, choice: Choice) -> None:
        self._interrupt(choice)
        self._parked[choice] = self._clock.call_later(max(0.0, self._left_s(choice)), lambda: self._give_up(choice))

    def _left_s(self, choice: Choice) -> float:
        """How much longer the choice may wait."""
        assert choice.interrupted_s is not None
        return choice.interrupted_s + self._limits.replay_patience_s - self._clock.time()

    def _unpark(self, choice: Choice) -> None:
        timer = self._parked.pop(choice, None)
        if timer is not None:
            timer.cancel()

    def _give_up(self, choice: Choice) -> None:
        self._unpark(choice)
        choice.fail(Unavailable("no engine is ready", retry_after_s=1.0))

    def _links_changed(self) -> None:
        if not self._links.ready:
            if self._was_ready and self._down_since_s is None:
                self._down_since_s = self._clock.time()
            return
        self._was_ready, self._down_since_s = True, None
        for choice in list(self._parked):
            self._place(choice, avoid=frozenset())


def _never_fits(choice: Choice, link: Link) -> bool:
    capacity = link.info.num_blocks * link.info.block_size
    return 0 < capacity < choice.num_tokens


def _name(choice: Choice) -> str:
    return f"{choice.submit.request_id}/{choice.index}"
