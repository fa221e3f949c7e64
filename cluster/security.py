"""Keys: the secret that our own processes show each other, and the keys that clients show."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from cluster.config.environment import variable
from cluster.config.load import ConfigError
from cluster.config.schema import ApiKeySection, SecuritySection
from cluster.front_door.quotas import Quota, Quotas
from cluster.front_door.tls import Certificates, TlsFiles

__all__ = ["administrators", "api_keys", "derived_secret", "new_secret", "quotas", "tls_files"]

_MIN_KEY_CHARS = 8
_QUOTA_KEYS = ("requests_per_minute", "tokens_per_minute", "max_open")


def new_secret() -> str:
    """Made at every start and never written down: what every internal port demands."""
    return secrets.token_urlsafe(32)


def derived_secret(ray_token: str) -> str:
    """The same for everybody with that token: where applications are built apart from each other."""
    return hmac.new(ray_token.encode(), b"shoal-secret", "sha256").hexdigest()


def api_keys(section: SecuritySection) -> Mapping[str, tuple[str, ...]]:
    """Clients' keys by the name of who holds them. Raises ConfigError for one that is no key."""
    given = {"default": section.api_key} if isinstance(section.api_key, str) else section.api_key or {}
    found: dict[str, tuple[str, ...]] = {}
    holders: dict[str, str] = {}
    named = [
        ("security.api_key" if isinstance(section.api_key, str) else f"security.api_key.{name}", name, key)
        for name, key in given.items()
    ]
    named += [(f"security.api_keys.{at}", one.tenant, _read(one, at)) for at, one in enumerate(section.api_keys)]
    for where, name, key in named:
        if len(key) < _MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{where}: must be at least {_MIN_KEY_CHARS} printable characters without spaces")
        if key in holders:
            raise ConfigError(f"{where}: two names hold the same key; the other one is {holders[key]}")
        holders[key] = where
        found[name] = (*found.get(name, ()), key)
    return found


def administrators(section: SecuritySection, keys: Mapping[str, object]) -> tuple[str, ...]:
    """Who may operate the cluster. Raises ConfigError for a name without a key."""
    for name in section.administrators:
        if name not in keys:
            raise ConfigError(f"security.administrators: {name} has no key; name it in security.api_key")
    roles: dict[str, str] = {}
    for at, one in enumerate(section.api_keys):
        if roles.setdefault(one.tenant, one.role) != one.role:
            raise ConfigError(f"security.api_keys.{at}.role: {one.tenant} is a {roles[one.tenant]} by another key")
    by_role = (name for name, role in roles.items() if role == "admin")
    return tuple(dict.fromkeys((*section.administrators, *by_role)))


def quotas(section: SecuritySection) -> Quotas:
    """What each tenant may ask for. Raises ConfigError where two keys of a tenant say different things."""
    limit = section.rate_limit
    default = Quota(**{name: getattr(limit, name) for name in _QUOTA_KEYS}) if limit is not None else Quota()
    own: dict[str, dict[str, int]] = {}
    for at, one in enumerate(section.api_keys):
        for name in _QUOTA_KEYS:
            value = getattr(one, name)
            known = own.setdefault(one.tenant, {})
            if value is not None and known.setdefault(name, value) != value:
                raise ConfigError(f"security.api_keys.{at}.{name}: {one.tenant} has {known[name]} by another key")
    fallback = {name: getattr(default, name) for name in _QUOTA_KEYS}
    return Quotas(default=default, tenants={name: Quota(**{**fallback, **given}) for name, given in own.items()})


def tls_files(section: SecuritySection) -> TlsFiles | None:
    """Raises ConfigError where the files are not there, or do not fit together."""
    if section.tls is None:
        return None
    paths = {name: Path(value).expanduser() for name, value in asdict(section.tls).items() if value is not None}
    for name, path in paths.items():
        if not path.is_file():
            raise ConfigError(f"security.tls.{name}: there is no file {path}")
    files = TlsFiles(**{name: str(path.absolute()) for name, path in paths.items()})
    try:
        Certificates(files)
    except (OSError, ValueError) as error:
        raise ConfigError(f"security.tls: the certificate and its key cannot be used together: {error}") from None
    return files


def _read(section: ApiKeySection, at: int) -> str:
    where = f"security.api_keys.{at}"
    given = [name for name in ("key", "key_file", "key_env") if getattr(section, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"{where}: give one of key, key_file and key_env, not {len(given)} of them")
    if section.key_file is not None:
        try:
            return Path(section.key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}.key_file: {section.key_file} cannot be read: {error}") from None
    if section.key_env is not None:
        value = variable(section.key_env)
        if not value:
            raise ConfigError(f"{where}.key_env: the environment has no {section.key_env}")
        return value
    assert section.key is not None
    return section.key
