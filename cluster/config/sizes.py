"""Sizes as people write them: "8GiB", "500 MB", "80%"."""

from __future__ import annotations

import re

__all__ = ["parse_share_or_size", "parse_size", "show_size"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[_letter] = 1024**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def parse_size(text: str, key: str) -> int:
    """Bytes of `text`. Raises ValueError naming `key`."""
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or float(match[1]) <= 0:
        raise ValueError(f'{key}: {text!r} is not a size such as "8GiB" or "500MB"')
    return int(float(match[1]) * unit)


def parse_share_or_size(text: str, whole_bytes: int, key: str) -> int:
    """Bytes of `text`, where a percentage is of `whole_bytes`. Raises ValueError naming `key`."""
    share = _SHARE.fullmatch(text)
    if share is None:
        if "%" in text:
            raise ValueError(f'{key}: {text!r} is not a share such as "80%"')
        return parse_size(text, key)
    percent = float(share[1])
    if not 0 < percent <= 100:
        raise ValueError(f"{key}: {text!r} must be above 0% and at most 100%")
    return int(whole_bytes * percent / 100)


def show_size(size_bytes: int) -> str:
    """`size_bytes` in the largest unit that leaves a number of at least one."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
