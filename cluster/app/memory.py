"""What a roster leaves to the one after it, in the key-value store of Ray's head.

There it outlives the roster's process, and Ray's head too where that keeps its own state.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import TypeAdapter
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from cluster.app.names import NAMESPACE, ROSTER
from cluster.front_door.groups import GroupAddress
from cluster.orders import KeptOrder
from cluster.roster import Decisions

__all__ = ["GcsMemory", "Kept", "decode", "encode"]

_KEY = ROSTER.encode()
_SPACE = NAMESPACE.encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """All that nobody reports, and the DP groups: where their leader died with the roster, nobody reports them for a
    while, and front doors are to go on with them."""

    decisions: Decisions = field(default_factory=Decisions)
    orders: tuple[KeptOrder, ...] = ()
    groups: tuple[GroupAddress, ...] = ()


class GcsMemory:
    """For processes that have joined Ray. Calls block, and raise ray.exceptions.RayError where the head is away."""

    def load(self) -> Kept:
        found = _internal_kv_get(_KEY, namespace=_SPACE)
        return decode(found) if found else Kept()

    def save(self, kept: Kept) -> None:
        _internal_kv_put(_KEY, encode(kept), overwrite=True, namespace=_SPACE)


def encode(kept: Kept) -> bytes:
    """As JSON."""
    return _KEPT.dump_json(kept)


def decode(text: bytes) -> Kept:
    """The opposite. Raises ValueError."""
    return _KEPT.validate_json(text)


_KEPT = TypeAdapter(Kept)
