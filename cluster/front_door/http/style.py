"""What the two endpoints have in common, and the seam where they differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Protocol

from cluster.front_door.call import Chunk, Usage
from cluster.front_door.http.gather import usage_object

__all__ = ["Envelope", "Style", "ids_to_json", "quoted", "to_json"]

quoted = encode_basestring
"""A string as JSON, non-ASCII as it is."""

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Any value as JSON, without spaces; made once, because making an encoder costs more than using it."""


def ids_to_json(token_ids: tuple[int, ...]) -> str:
    """A list of integers as JSON."""
    return f"[{','.join(map(str, token_ids))}]"


class Style(Protocol):
    """How one endpoint writes its choices. One object serves one request."""

    kind: str  # `object` of a whole answer
    event_kind: str  # `object` of an event

    def whole(self, at: int, chunk: Chunk) -> dict[str, object]:
        """A choice that `chunk` holds all of; `at` says of which call."""
        ...

    def part(self, at: int, chunk: Chunk, *, first: bool) -> list[dict[str, object]]:
        """The choices of the events that a chunk makes."""
        ...

    def plain(self, at: int, chunk: Chunk) -> str | None:
        """The same as JSON for a chunk that is nothing but text in the middle; None where it is more."""
        ...

    def extras(self, chunk: Chunk) -> dict[str, object]:
        """Fields beside the choices, from the first chunk of an answer."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """What stands around the choices."""

    id: str
    model: str
    created_s: int

    def whole(self, style: Style, choices: list[tuple[int, Chunk]], usage: Usage) -> dict[str, object]:
        extras: dict[str, object] = {}
        for _, chunk in choices[:1]:
            extras = style.extras(chunk)
        return {
            **self._fields(style.kind),
            "choices": [style.whole(at, chunk) for at, chunk in choices],
            "usage": usage_object(usage),
            **extras,
        }

    def head(self, style: Style) -> str:
        """The beginning of every event, up to its choices."""
        fields = to_json(self._fields(style.event_kind))
        return f'data: {fields[:-1]},"choices":['

    def _fields(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self.created_s, "model": self.model}
