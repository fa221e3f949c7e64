"""Clients' keys."""

from __future__ import annotations

import pytest

from cluster.front_door.auth import ApiKeys, key_in_metadata
from cluster.front_door.errors import Unauthenticated


def test_without_keys_everybody_comes_in_without_a_name() -> None:
    assert ApiKeys({})("") == ApiKeys({})("anything") == ""


def test_a_key_names_its_holder() -> None:
    keys = ApiKeys({"ann": "key-of-ann", "bob": "key-of-bob"})
    assert (keys("key-of-ann"), keys("key-of-bob")) == ("ann", "bob")
    for wrong in ("", "key-of-an", "key-of-anne", "KEY-OF-ANN", "käse"):
        with pytest.raises(Unauthenticated) as caught:
            keys(wrong)
        assert not wrong or wrong not in caught.value.message


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ([], ""),
        ([("authorization", "Bearer abc")], "abc"),
        ([("authorization", "bearer abc ")], "abc"),
        ([("authorization", "Basic abc")], ""),
        ([("x-api-key", "abc")], "abc"),
        ([("x-api-key", "abc"), ("authorization", "Bearer def")], "def"),
        ([("x-trace-bin", b"\xff"), ("x-api-key", "abc")], "abc"),
    ],
)
def test_where_a_key_is_found(metadata: list[tuple[str, str | bytes]], key: str) -> None:
    assert key_in_metadata(metadata) == key
