"""Routing to where a prompt's beginning is in the KV cache already, for as long as that group is not busier for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from scheduler.groups import GroupView, RouteRequest, RoutingPolicy, fit, tokens_ahead
from scheduler.prefix import extend_hashes, hash_of_tenant

__all__ = ["PrefixAffinity", "PrefixMemory", "route_prefix"]

_PIECE_TOKENS = 64
_MOST_GROUPS = 4


def route_prefix(token_ids: Sequence[int], tenant: str = "") -> list[bytes]:
    """The hashes of a prompt's beginnings, one for every 64 tokens, the shortest first."""
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, _PIECE_TOKENS, root=hash_of_tenant(tenant))
    return hashes


class PrefixMemory:
    """Which groups a beginning was sent to lately. Bounded: what was used longest ago is forgotten first."""

    def __init__(self, *, max_entries: int, ttl_s: float) -> None:
        self._max_entries = max_entries
        self._ttl_s = ttl_s
        self._groups: OrderedDict[bytes, tuple[tuple[str, float], ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    def groups_of(self, beginning: bytes, now_s: float) -> Iterator[str]:
        """The keys of the groups that are likely to hold it still, the one sent there last first."""
        for key, sent_s in self._groups.get(beginning, ()):
            if now_s - sent_s <= self._ttl_s:
                yield key

    def sent(self, prefix: Sequence[bytes], key: str, now_s: float) -> None:
        """A sequence with these beginnings goes to that group."""
        # The longest first, so that it is forgotten first: it is of no use without the shorter ones.
        for beginning in reversed(prefix):
            others = [entry for entry in self._groups.pop(beginning, ()) if entry[0] != key]
            self._groups[beginning] = ((key, now_s), *others[: _MOST_GROUPS - 1])
        while len(self._groups) > self._max_entries:
            self._groups.popitem(last=False)


class PrefixAffinity:
    """The group with the longest known beginning, unless it is saturated; then one with a shorter, else any other.

    A group is saturated for a beginning when more tokens are ahead there than in the least busy group by `patience`
    times the tokens that it would spare: a long conversation stays where it is, a short prompt that everybody shares
    draws nobody to a busy group. `otherwise` chooses where nothing is known.
    """

    def __init__(
        self,
        otherwise: RoutingPolicy,
        *,
        patience: float = 4.0,
        max_entries: int = 1 << 16,
        ttl_s: float = 900.0,
    ) -> None:
        self._otherwise = otherwise
        self._patience = patience
        self._memory = PrefixMemory(max_entries=max_entries, ttl_s=ttl_s)

    def choose(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        index = self._known(groups, request)
        if index is None:
            index = self._otherwise.choose(groups, request)
        if index is not None:
            self._memory.sent(request.prefix, groups[index].key, request.now_s)
        return index

    def _known(self, groups: Sequence[GroupView], request: RouteRequest) -> int | None:
        indices = {groups[index].key: index for index in fit(groups, request)}
        if not indices:
            return None
        least = min(tokens_ahead(groups[index]) for index in indices.values())
        for length in range(len(request.prefix), 0, -1):
            limit = least + self._patience * length * _PIECE_TOKENS
            known = [
                indices[key]
                for key in self._memory.groups_of(request.prefix[length - 1], request.now_s)
                if key in indices and tokens_ahead(groups[indices[key]]) <= limit
            ]
            if known:
                return min(known, key=lambda index: tokens_ahead(groups[index]))
        return None
