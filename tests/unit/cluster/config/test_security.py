"""Clients' keys."""

from __future__ import annotations

import pytest

from cluster.config import ConfigError, parse
from cluster.security import api_keys, new_secret


def keys(value: object) -> dict[str, str]:
    return dict(api_keys(parse({"security": {"api_key": value}}).security))


def test_one_key_several_keys_no_key() -> None:
    assert keys("long-enough") == {"default": "long-enough"}
    assert keys({"a": "long-enough", "b": "another-one"}) == {"a": "long-enough", "b": "another-one"}
    assert keys(None) == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("short", "security.api_key: must be at least 8"),
        ({"a": "with blank"}, "security.api_key.a: must be at least 8 printable characters without spaces"),
        ({"a": "ungültig-ist"}, "security.api_key.a"),
        ({"a": "long-enough", "b": "long-enough"}, "two names hold the same key"),
    ],
)
def test_what_is_no_key(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keys(value)


def test_every_secret_is_another() -> None:
    assert len({new_secret() for _ in range(10)}) == 10
    assert len(new_secret()) >= 32
