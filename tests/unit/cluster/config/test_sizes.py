"""Sizes as people write them."""

from __future__ import annotations

import pytest

from cluster.config.sizes import parse_share_or_size, parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("8GiB", 8 * 1024**3), ("500 MB", 500_000_000), ("1.5k", 1536), ("7", 7), (" 2 tib ", 2 * 1024**4), ("3B", 3)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text, "key") == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1XB", "-1", "0", "1 2", "80%"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"^key: "):
        parse_size(text, "key")


def test_shares_are_of_the_whole() -> None:
    assert parse_share_or_size("80%", 1000, "key") == 800
    assert parse_share_or_size("12.5 %", 1000, "key") == 125
    assert parse_share_or_size("1k", 1000, "key") == 1024


@pytest.mark.parametrize("text", ["0%", "100.1%", "%", "a%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError, match=r"^key: "):
        parse_share_or_size(text, 1000, "key")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5.0 TiB")],
)
def test_shown(size_bytes: int, text: str) -> None:
    assert show_size(size_bytes) == text
