"""Typed reading of a JSON object whose every value may be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["Fields"]


class Fields:
    """The fields of config.json; null counts as absent. Every method raises ValueError naming the field."""

    def __init__(self, raw: Mapping[str, object]) -> None:
        self._raw = raw

    def present(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least one."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {name} must be a positive whole number, not {value!r}")
        return value

    def optional_size(self, name: str) -> int | None:
        """A whole number of at least one, or None where the field is absent."""
        return None if self._raw.get(name) is None else self.size(name)

    def sizes(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers of at least one; empty where the field is absent."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(type(item) is int and item >= 1 for item in value):
            raise ValueError(f"config.json: {name} must be a list of positive whole numbers, not {value!r}")
        return tuple(value)

    def count(self, name: str, default: int) -> int:
        """A whole number of at least zero."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"config.json: {name} must be a whole number of at least zero, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"config.json: {name} must be a positive number, not {value!r}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A positive number, or None where the field is absent."""
        return None if self._raw.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise ValueError(f"config.json: {name} must be a string, not {value!r}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where the field is absent."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"config.json: {name} must be a list of strings, not {value!r}")
        return tuple(value)

    def section(self, name: str) -> Fields | None:
        """A nested object, or None where the field is absent or empty."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"config.json: {name} must be an object, not {value!r}")
        return Fields(value) if value else None

    def _value(self, name: str, default: object) -> object:
        value = self._raw.get(name)
        if value is not None:
            return value
        if default is None:
            raise ValueError(f"config.json: {name} is missing")
        return default
