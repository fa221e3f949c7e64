"""Keys: the secret that our own processes show each other, and the keys that clients show."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from cluster.config.load import ConfigError
from cluster.config.schema import SecuritySection

__all__ = ["administrators", "api_keys", "new_secret"]

_MIN_KEY_CHARS = 8


def new_secret() -> str:
    """Made at every start and never written down: what every internal port demands."""
    return secrets.token_urlsafe(32)


def api_keys(section: SecuritySection) -> Mapping[str, str]:
    """Clients' keys by the name of who holds them. Raises ConfigError for one that is no key."""
    given = {"default": section.api_key} if isinstance(section.api_key, str) else section.api_key or {}
    for name, key in given.items():
        where = "security.api_key" if isinstance(section.api_key, str) else f"security.api_key.{name}"
        if len(key) < _MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{where}: must be at least {_MIN_KEY_CHARS} printable characters without spaces")
    if len(set(given.values())) < len(given):
        raise ConfigError("security.api_key: two names hold the same key")
    return dict(given)


def administrators(section: SecuritySection, keys: Mapping[str, str]) -> tuple[str, ...]:
    """Who may operate the cluster. Raises ConfigError for a name without a key."""
    for name in section.administrators:
        if name not in keys:
            raise ConfigError(f"security.administrators: {name} has no key; name it in security.api_key")
    return section.administrators
