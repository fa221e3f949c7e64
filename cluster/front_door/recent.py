"""Calls that ended, or whose client went away, kept for a while so that the client may come back for the rest."""

from __future__ import annotations

from collections import OrderedDict

from cluster.front_door.groups import Clock
from cluster.front_door.limits import Limits
from cluster.front_door.open_request import OpenRequest

__all__ = ["Recent"]


class Recent:
    """Bounded by time, number and tokens; the oldest go first."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str], tuple[OpenRequest, float, int]] = OrderedDict()
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, request: OpenRequest) -> None:
        """Replaces an older call of the same id."""
        self.take(request.key)
        num_tokens = request.num_kept_tokens
        self._kept[request.key] = (request, self._clock.time() + self._limits.resume_window_s, num_tokens)
        self._num_tokens += num_tokens
        self._trim()
        self._clock.call_later(self._limits.resume_window_s, self._trim)

    def take(self, key: tuple[str, str]) -> OpenRequest | None:
        """Hands a call back; it is not kept any longer."""
        self._trim()
        entry = self._kept.pop(key, None)
        if entry is None:
            return None
        self._num_tokens -= entry[2]
        return entry[0]

    def _trim(self) -> None:
        limits, now_s = self._limits, self._clock.time()
        while self._kept:
            key, (_, expires_s, num_tokens) = next(iter(self._kept.items()))
            too_many = len(self._kept) > limits.max_resumable_requests or self._num_tokens > limits.max_resumable_tokens
            if expires_s > now_s and not too_many:
                return
            del self._kept[key]
            self._num_tokens -= num_tokens
