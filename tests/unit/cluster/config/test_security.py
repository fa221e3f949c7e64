"""Clients' keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ConfigError, parse
from cluster.config.scheduling import scheduling_settings
from cluster.config.schema import SecuritySection
from cluster.front_door.quotas import Quota
from cluster.front_door.tls import TlsFiles
from cluster.security import administrators, api_keys, new_secret, quotas, tls_files
from tests.certificates import Authority


def keys(value: object) -> dict[str, tuple[str, ...]]:
    return dict(api_keys(parse({"security": {"api_key": value}}).security))


def test_one_key_several_keys_no_key() -> None:
    assert keys("long-enough") == {"default": ("long-enough",)}
    assert keys({"a": "long-enough", "b": "another-one"}) == {"a": ("long-enough",), "b": ("another-one",)}
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


def section(*entries: dict[str, object], **more: object) -> SecuritySection:
    return parse({"security": {"api_keys": list(entries), **more}}).security


def test_keys_come_from_the_file_from_files_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    monkeypatch.setenv("BOBS_KEY", "from-a-variable")
    given = section(
        {"tenant": "ann", "key": "given-here"},
        {"tenant": "ann", "key_file": str(tmp_path / "key")},
        {"tenant": "bob", "key_env": "BOBS_KEY", "role": "admin"},
        api_key={"eve": "the-old-way"},
    )
    found = api_keys(given)
    assert found == {"eve": ("the-old-way",), "ann": ("given-here", "from-a-file"), "bob": ("from-a-variable",)}
    assert administrators(given, found) == ("bob",)


def test_each_tenant_has_its_own_limits_or_those_of_all() -> None:
    given = section(
        {"tenant": "ann", "key": "given-here", "requests_per_minute": 10},
        {"tenant": "ann", "key": "another-one", "max_open": 2},
        {"tenant": "bob", "key": "key-of-bob"},
        rate_limit={"tokens_per_minute": 600},
    )
    limits = quotas(given)
    assert limits.of("ann") == Quota(requests_per_minute=10, tokens_per_minute=600, max_open=2)
    assert limits.of("bob") == limits.of("anybody") == Quota(tokens_per_minute=600)
    assert quotas(section()).of("") == Quota()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"tenant": "a"}], r"security\.api_keys\.0: give one of key, key_file and key_env, not 0"),
        ([{"tenant": "a", "key": "long-enough", "key_env": "X"}], "not 2 of them"),
        ([{"tenant": "a", "key_env": "SHOAL_NO_SUCH_THING"}], "the environment has no SHOAL_NO_SUCH_THING"),
        ([{"tenant": "a", "key_file": "/no/such/file"}], r"api_keys\.0\.key_file: /no/such/file cannot be read"),
        ([{"tenant": "a", "key": "short"}], r"security\.api_keys\.0: must be at least 8"),
        ([{"tenant": "", "key": "long-enough"}], r"security\.api_keys\.0\.tenant"),
        ([{"tenant": "a", "key": "long-enough"}, {"tenant": "b", "key": "long-enough"}], "two names hold the same key"),
        ([{"tenant": "a", "key": "long-enough", "role": "king"}], r"api_keys\.0\.role: must be 'user' or 'admin'"),
        ([{"tenant": "a", "key": "long-enough", "rpm": 5}], r"security\.api_keys\.0\.rpm: unknown key"),
        ([{"tenant": "a", "key": "long-enough", "max_open": 0}], r"api_keys\.0\.max_open"),
        (
            [
                {"tenant": "a", "key": "long-enough", "max_open": 1},
                {"tenant": "a", "key": "another-one", "max_open": 2},
            ],
            r"api_keys\.1\.max_open: a has 1 by another key",
        ),
        (
            [{"tenant": "a", "key": "long-enough"}, {"tenant": "a", "key": "another-one", "role": "admin"}],
            r"api_keys\.1\.role: a is a user by another key",
        ),
    ],
)
def test_entries_that_say_too_little_or_too_much(entries: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(*entries)


def check(*entries: dict[str, object]) -> None:
    given = section(*entries)
    quotas(given)
    administrators(given, api_keys(given))


def test_weights_reach_the_batchers() -> None:
    entries = [{"tenant": "ann", "key": "given-here", "weight": 3}, {"tenant": "bob", "key": "key-of-bob"}]
    fairness = scheduling_settings(parse({"security": {"api_keys": entries}})).fairness
    assert fairness is not None
    assert fairness.tenants["ann"].weight == 3
    assert fairness.default.weight == 1


def test_certificates_are_checked_before_anything_starts(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    _, other = authority.issue("other")

    def files(**names: Path) -> TlsFiles | None:
        given = {name: str(path) for name, path in names.items()}
        return tls_files(parse({"security": {"tls": given}}).security)

    assert files(cert=cert, key=key) == TlsFiles(cert=str(cert), key=str(key))
    with pytest.raises(ConfigError, match=r"security\.tls: the certificate and its key cannot be used together"):
        files(cert=cert, key=other)
    with pytest.raises(ConfigError, match=r"security\.tls\.client_ca: there is no file"):
        files(cert=cert, key=key, client_ca=tmp_path / "none.pem")
    assert tls_files(parse({}).security) is None
