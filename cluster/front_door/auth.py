"""Who a client is, from the key it shows."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping, Sequence

from cluster.front_door.errors import Unauthenticated

__all__ = ["ApiKeys", "Authenticate", "key_in_metadata"]

Authenticate = Callable[[str], str]
"""A key (empty where none was sent) to the client's name; raises Unauthenticated or PermissionDenied."""


class ApiKeys:
    """Clients' keys by name; a name may hold several. With none configured everybody may come in, without a name."""

    def __init__(self, keys: Mapping[str, str | Sequence[str]]) -> None:
        several = {name: (held,) if isinstance(held, str) else held for name, held in keys.items()}
        self._keys = [(name, key.encode()) for name, held in several.items() for key in held]

    def __call__(self, key: str) -> str:
        if not self._keys:
            return ""
        if not key:
            raise Unauthenticated("an API key is needed: send it as `authorization: Bearer KEY`")
        shown = key.encode("utf-8", "surrogateescape")
        # All are compared, each in constant time: how long this takes tells nothing of how close a guess was.
        names = [name for name, known in self._keys if hmac.compare_digest(shown, known)]
        if not names:
            raise Unauthenticated("the API key is not known here")
        return names[0]


def key_in_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The key in `authorization: Bearer KEY` or `x-api-key: KEY`; empty where there is neither."""
    found = ""
    for name, value in metadata:
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if name == "authorization":
            scheme, _, key = text.partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
        elif name == "x-api-key":
            found = text.strip()
    return found
